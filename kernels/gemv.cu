// out = epilogue(a w^T) for one row: the linear layers of decoding, bound by the bytes of the weight.
//
// A warp makes four columns, those that an epilogue wants together; where that would leave multiprocessors idle, two or
// four warps share them, each with its part of k. A kernel asks for its first weights while the one before it still runs;
// only then it waits for what that one writes.
//
// Where a norm is given, a is normalised first, by each CTA for itself: a few kilobytes from the L2 cache instead of a
// launch.
#include <type_traits>

#include "common.cuh"
#include "epilogue.cuh"
#include "kernels.h"

namespace {

constexpr int kWarps = 4, kThreads = kWarps * 32;
constexpr int kColumns = 4;  // of a warp
constexpr int kUnroll = 4;   // 16-byte loads of each column that a lane has under way
constexpr int kBlocksPerMultiprocessor = 5;

struct Logits {
    float *out;
};

struct Operands {
    const uint4 *a;       // [vectors]
    const uint4 *norm;    // [vectors] or null
    const uint4 *weight;  // [n, vectors]
    const bf16 *bias;     // [n] or null
    const int32_t *out_row;  // or null for 0
    int n, vectors;
    float eps;
};

__device__ float dot(uint4 x, uint4 y, float sum) {
    const uint32_t a[4] = {x.x, x.y, x.z, x.w}, b[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 p = unpack(a[i]), q = unpack(b[i]);
        sum += p.x * q.x + p.y * q.y;
    }
    return sum;
}

__device__ uint4 scaled(uint4 x, uint4 weight, float scale) {
    uint32_t out[4];
    const uint32_t a[4] = {x.x, x.y, x.z, x.w}, b[4] = {weight.x, weight.y, weight.z, weight.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 p = unpack(a[i]), q = unpack(b[i]);
        out[i] = pack(p.x * scale * q.x, p.y * scale * q.y);
    }
    return {out[0], out[1], out[2], out[3]};
}

// The weights are read once and are more than the caches hold.
__device__ uint4 load_weight(const uint4 *at) { return __ldcs(at); }

// RMSNorm of a, in shared memory: `norm`, which holds the norm's weights, becomes the result. `raw` has room for a.
__device__ void normalise(uint4 *norm, uint4 *raw, const Operands &operands) {
    __shared__ float warp_sums[kWarps];
    float sum = 0.f;
    for (int i = threadIdx.x; i < operands.vectors; i += kThreads) {
        raw[i] = operands.a[i];
        sum = dot(raw[i], raw[i], sum);
    }
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.f;
    for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[warp];
    const float scale = rsqrtf(sum / (operands.vectors * 8) + operands.eps);
    // Each thread's own vectors, so that no barrier is needed before.
    for (int i = threadIdx.x; i < operands.vectors; i += kThreads) norm[i] = scaled(raw[i], norm[i], scale);
    __syncthreads();
}

template <int kSplit, class Epilogue>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    gemv_kernel(const Operands operands, const Epilogue epilogue) {
    extern __shared__ uint4 normed[];
    __shared__ float parts[kWarps][kColumns];
    constexpr int kGroups = kWarps / kSplit;  // of columns, in a CTA at a time
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, vectors = operands.vectors;
    const int groups = operands.n / kColumns, part = warp % kSplit;
    constexpr int kStep = 32 * kSplit;

    // Weights on their way: those of vector at + u * kStep in ahead[u].
    uint4 ahead[kUnroll][kColumns];
    auto column_of = [](int group) { return group / 4 * 16 + group % 4 * 2; };
    auto load = [&](uint4 (&to)[kColumns], int group, int vector) {
        if (vector >= vectors) return;
        const uint4 *from = operands.weight + static_cast<size_t>(column_of(group)) * vectors + vector;
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
            to[c] = load_weight(from + static_cast<size_t>(c / 2 * 8 + c % 2) * vectors);
    };
    auto load_first = [&](int group) {
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) load(ahead[u], group, part * 32 + lane + u * kStep);
    };

    int group = blockIdx.x * kGroups + warp / kSplit;
    start_next();
    if (group < groups) load_first(group);
    if (operands.norm)
        for (int i = threadIdx.x; i < vectors; i += kThreads) normed[i] = operands.norm[i];
    wait_for_previous();
    if (operands.norm) normalise(normed, normed + vectors, operands);
    const uint4 *a = operands.norm ? normed : operands.a;
    const int row = operands.out_row ? *operands.out_row : 0;

    // Every warp takes as many turns, so that all meet at the barrier.
    for (int base = blockIdx.x * kGroups; base < groups; base += gridDim.x * kGroups) {
        group = base + warp / kSplit;
        float sums[kColumns] = {};
        if (group < groups) {
            if (base != static_cast<int>(blockIdx.x) * kGroups) load_first(group);
            for (int from = part * 32 + lane; from < vectors; from += kUnroll * kStep) {
#pragma unroll
                for (int u = 0; u < kUnroll; ++u) {
                    const int vector = from + u * kStep;
                    if (vector >= vectors) break;
                    const uint4 x = a[vector];
#pragma unroll
                    for (int c = 0; c < kColumns; ++c) sums[c] = dot(x, ahead[u][c], sums[c]);
                    load(ahead[u], group, vector + kUnroll * kStep);
                }
            }
#pragma unroll
            for (int c = 0; c < kColumns; ++c)
                for (int offset = 16; offset > 0; offset /= 2)
                    sums[c] += __shfl_xor_sync(0xffffffffu, sums[c], offset);
        }
        if constexpr (kSplit > 1) {
            if (lane == 0)
                for (int c = 0; c < kColumns; ++c) parts[warp][c] = sums[c];
            __syncthreads();
            if (part == 0)
                for (int p = 1; p < kSplit; ++p)
                    for (int c = 0; c < kColumns; ++c) sums[c] += parts[warp + p][c];
            __syncthreads();
        }
        if (part > 0 || lane > 0 || group >= groups) continue;
        const int column = column_of(group);
        if (operands.bias) {
            const float2 low = unpack(*reinterpret_cast<const uint32_t *>(operands.bias + column));
            const float2 high = unpack(*reinterpret_cast<const uint32_t *>(operands.bias + column + 8));
            sums[0] += low.x, sums[1] += low.y, sums[2] += high.x, sums[3] += high.y;
        }
        const float low[2] = {sums[0], sums[1]}, high[2] = {sums[2], sums[3]};
        if constexpr (std::is_same_v<Epilogue, Logits>) {
            *reinterpret_cast<float2 *>(epilogue.out + column) = {low[0], low[1]};
            *reinterpret_cast<float2 *>(epilogue.out + column + 8) = {high[0], high[1]};
        } else {
            uint32_t words[Epilogue::kWords];
            epilogue.apply(words, row, column, low, high, epilogue.load(row, column));
            store(epilogue, row, column, words);
        }
    }
}

template <int kSplit, class Epilogue>
int32_t launch_split(const Operands &operands, const Epilogue &epilogue, int multiprocessors, void *stream) {
    const int per_block = kWarps / kSplit, groups = operands.n / kColumns;
    const int blocks = (groups + per_block - 1) / per_block, most = multiprocessors * kBlocksPerMultiprocessor;
    const int shared_bytes = operands.norm ? operands.vectors * 2 * 16 : 0;
    return launch_overlapping(gemv_kernel<kSplit, Epilogue>, blocks < most ? blocks : most, kThreads, shared_bytes,
                              stream, operands, epilogue);
}

template <class Epilogue>
int32_t launch(const Operands &operands, const Epilogue &epilogue, void *stream) {
    int device, multiprocessors;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (status != cudaSuccess) return status;
    const int warps = operands.n / kColumns;
    if (warps >= multiprocessors * kWarps) return launch_split<1>(operands, epilogue, multiprocessors, stream);
    if (warps * 2 >= multiprocessors * kWarps && operands.vectors <= 2 * kUnroll * 32)
        return launch_split<2>(operands, epilogue, multiprocessors, stream);
    return launch_split<4>(operands, epilogue, multiprocessors, stream);
}

Operands operands_of(const void *a, const void *norm, float eps, const void *weight, const void *bias,
                     const int32_t *out_row, int32_t n, int32_t k) {
    return {static_cast<const uint4 *>(a),
            static_cast<const uint4 *>(norm),
            static_cast<const uint4 *>(weight),
            static_cast<const bf16 *>(bias),
            out_row,
            n,
            k / 8,
            eps};
}

}  // namespace

extern "C" int32_t gleaner_gemv_logits(float *out, const void *a, const void *norm, const void *weight, float eps,
                                       int32_t n, int32_t k, void *stream) {
    return launch(operands_of(a, norm, eps, weight, nullptr, nullptr, n, k), Logits{out}, stream);
}

extern "C" int32_t gleaner_gemv_residual(void *x, const void *a, const void *weight, const void *bias, int32_t n,
                                         int32_t k, void *stream) {
    return launch(operands_of(a, nullptr, 0.f, weight, bias, nullptr, n, k), Residual{static_cast<bf16 *>(x), n},
                  stream);
}

extern "C" int32_t gleaner_gemv_swiglu(void *out, const void *a, const void *norm, const void *weight, const void *bias,
                                       float eps, int32_t n, int32_t k, void *stream) {
    return launch(operands_of(a, norm, eps, weight, bias, nullptr, n, k), SwiGlu{static_cast<bf16 *>(out), n / 2},
                  stream);
}

extern "C" int32_t gleaner_gemv_rope(void *out, const void *a, const void *norm, const void *weight, const void *bias,
                                     const void *table, const int32_t *out_row, float eps, int32_t n, int32_t k,
                                     int32_t head_dim, int32_t rope_columns, void *stream) {
    const Rope rope{static_cast<bf16 *>(out), static_cast<const float2 *>(table), nullptr, n, head_dim, rope_columns};
    return launch(operands_of(a, norm, eps, weight, bias, out_row, n, k), rope, stream);
}
