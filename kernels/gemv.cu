// out = epilogue(a w^T) for one row: the linear layers of decoding, bound by the bytes of the weight.
//
// A warp makes four columns, those that an epilogue wants together; where that would leave multiprocessors idle, two or
// four warps share them, each with its part of k. A kernel asks for its first weights while the one before it still runs;
// only then it waits for what that one writes.
//
// Where a row is normalised first, each CTA brings x times the norm's weights into its shared memory. What a row is divided
// by is one number, and is applied to the sums at their end: nothing waits for it.
#include <type_traits>

#include "common.cuh"
#include "epilogue.cuh"
#include "kernels.h"
#include "token_order.cuh"

namespace {

constexpr int kWarps = 4, kThreads = kWarps * 32;
constexpr int kColumns = 4;  // of a warp
constexpr int kUnroll = 4;   // 16-byte loads of each column that a lane has under way
constexpr int kBlocksPerMultiprocessor = 5;

struct Logits {
    float *out;
    Wide *best;
    int vocab_size;
};

// Adds to the residual stream.
struct Add {
    float *x;
};

struct Operands {
    const uint4 *a;       // [vectors], for Add
    const float4 *x;      // [2 * vectors], for all others, which normalise it
    const uint4 *norm;    // [vectors]
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

__device__ float dot(const float *x, uint4 y, float sum) {
    const float4 low = reinterpret_cast<const float4 *>(x)[0], high = reinterpret_cast<const float4 *>(x)[1];
    const float2 q0 = unpack(y.x), q1 = unpack(y.y), q2 = unpack(y.z), q3 = unpack(y.w);
    sum += low.x * q0.x + low.y * q0.y;
    sum += low.z * q1.x + low.w * q1.y;
    sum += high.x * q2.x + high.y * q2.y;
    return sum + high.z * q3.x + high.w * q3.y;
}

// The weights are read once and are more than the caches hold.
__device__ uint4 load_weight(const uint4 *at) { return __ldcs(at); }

// Brings x times the norm's weights, which lie in `to` already, there. Returns what a row is to be multiplied with.
__device__ float normalise(float *to, const Operands &operands) {
    __shared__ float warp_sums[kWarps];
    float sum = 0.f;
    for (int i = threadIdx.x; i < operands.vectors; i += kThreads) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float4 x = operands.x[i * 2 + half];
            sum += x.x * x.x + x.y * x.y + (x.z * x.z + x.w * x.w);
            // A thread's own values, so that no barrier is needed before.
            auto *at = reinterpret_cast<float4 *>(to + i * 8) + half;
            *at = {x.x * at->x, x.y * at->y, x.z * at->z, x.w * at->w};
        }
    }
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.f;
    for (int warp = 0; warp < kWarps; ++warp) sum += warp_sums[warp];
    return rsqrtf(sum / (operands.vectors * 8) + operands.eps);
}

template <int kSplit, class Epilogue>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    gemv_kernel(const Operands operands, const Epilogue epilogue) {
    extern __shared__ __align__(16) float normed[];
    __shared__ float parts[kWarps][kColumns];
    constexpr int kGroups = kWarps / kSplit;  // of columns, in a CTA at a time
    // What is added to the residual stream is not normalised; everything else is.
    constexpr bool kNormed = !std::is_same_v<Epilogue, Add>;
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
    if constexpr (kNormed)
        for (int i = threadIdx.x; i < vectors; i += kThreads) {
            const uint4 weights = operands.norm[i];
            const uint32_t words[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
            for (int w = 0; w < 4; ++w) reinterpret_cast<float2 *>(normed + i * 8)[w] = unpack(words[w]);
        }
    wait_for_previous();
    [[maybe_unused]] const float scale = kNormed ? normalise(normed, operands) : 1.f;
    [[maybe_unused]] const int row = operands.out_row ? *operands.out_row : 0;

    [[maybe_unused]] Wide best = 0;
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
                    if constexpr (kNormed) {
#pragma unroll
                        for (int c = 0; c < kColumns; ++c) sums[c] = dot(normed + vector * 8, ahead[u][c], sums[c]);
                    } else {
                        const uint4 x = operands.a[vector];
#pragma unroll
                        for (int c = 0; c < kColumns; ++c) sums[c] = dot(x, ahead[u][c], sums[c]);
                    }
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
        if constexpr (kNormed)
            for (float &sum : sums) sum *= scale;
        if constexpr (std::is_same_v<Epilogue, Logits>) {
            *reinterpret_cast<float2 *>(epilogue.out + column) = {sums[0], sums[1]};
            *reinterpret_cast<float2 *>(epilogue.out + column + 8) = {sums[2], sums[3]};
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
                const int id = column + c / 2 * 8 + c % 2;
                if (id < epilogue.vocab_size) best = max(best, ordered(sums[c], id));
            }
        } else {
            if (operands.bias) {
                const float2 low = unpack(*reinterpret_cast<const uint32_t *>(operands.bias + column));
                const float2 high = unpack(*reinterpret_cast<const uint32_t *>(operands.bias + column + 8));
                sums[0] += low.x, sums[1] += low.y, sums[2] += high.x, sums[3] += high.y;
            }
            if constexpr (std::is_same_v<Epilogue, Add>) {
                auto *at = reinterpret_cast<float2 *>(epilogue.x + column);
                at[0] = {at[0].x + sums[0], at[0].y + sums[1]};
                at[4] = {at[4].x + sums[2], at[4].y + sums[3]};
            } else {
                const float low[2] = {sums[0], sums[1]}, high[2] = {sums[2], sums[3]};
                uint32_t words[Epilogue::kWords];
                epilogue.apply(words, column, low, high, epilogue.load(row, column));
                store(epilogue, row, column, words);
            }
        }
    }
    // The largest of all, in whatever order they come.
    if constexpr (std::is_same_v<Epilogue, Logits>)
        if (best > 0) atomicMax(epilogue.best, best);
}

template <int kSplit, class Epilogue>
int32_t launch_split(const Operands &operands, const Epilogue &epilogue, int multiprocessors, void *stream) {
    const int per_block = kWarps / kSplit, groups = operands.n / kColumns;
    const int blocks = (groups + per_block - 1) / per_block, most = multiprocessors * kBlocksPerMultiprocessor;
    const int shared_bytes = operands.norm ? operands.vectors * 8 * sizeof(float) : 0;
    return launch_overlapping(gemv_kernel<kSplit, Epilogue>, blocks < most ? blocks : most, kThreads, shared_bytes,
                              stream, operands, epilogue);
}

template <class Epilogue>
int32_t launch(const Operands &operands, const Epilogue &epilogue, void *stream) {
    int multiprocessors;
    const cudaError_t status = device_attribute(&multiprocessors, cudaDevAttrMultiProcessorCount);
    if (status != cudaSuccess) return status;
    const int warps = operands.n / kColumns;
    if (warps >= multiprocessors * kWarps) return launch_split<1>(operands, epilogue, multiprocessors, stream);
    if (warps * 2 >= multiprocessors * kWarps && operands.vectors <= 2 * kUnroll * 32)
        return launch_split<2>(operands, epilogue, multiprocessors, stream);
    return launch_split<4>(operands, epilogue, multiprocessors, stream);
}

Operands operands_of(const void *a, const float *x, const void *norm, float eps, const void *weight, const void *bias,
                     const int32_t *out_row, int32_t n, int32_t k) {
    return {static_cast<const uint4 *>(a),
            reinterpret_cast<const float4 *>(x),
            static_cast<const uint4 *>(norm),
            static_cast<const uint4 *>(weight),
            static_cast<const bf16 *>(bias),
            out_row,
            n,
            k / 8,
            eps};
}

}  // namespace

extern "C" int32_t gleaner_gemv_logits(float *out, uint64_t *best, const float *x, const void *norm, const void *weight,
                                       float eps, int32_t vocab_size, int32_t n, int32_t k, void *stream) {
    const Logits logits{out, reinterpret_cast<Wide *>(best), vocab_size};
    return launch(operands_of(nullptr, x, norm, eps, weight, nullptr, nullptr, n, k), logits, stream);
}

extern "C" int32_t gleaner_gemv_residual(float *x, const void *a, const void *weight, const void *bias, int32_t n,
                                         int32_t k, void *stream) {
    return launch(operands_of(a, nullptr, nullptr, 0.f, weight, bias, nullptr, n, k), Add{x}, stream);
}

extern "C" int32_t gleaner_gemv_swiglu(void *out, const float *x, const void *norm, const void *weight, const void *bias,
                                       float eps, int32_t n, int32_t k, void *stream) {
    return launch(operands_of(nullptr, x, norm, eps, weight, bias, nullptr, n, k), SwiGlu{static_cast<bf16 *>(out), n / 2},
                  stream);
}

extern "C" int32_t gleaner_gemv_rope(void *out, const float *x, const void *norm, const void *weight, const void *bias,
                                     const void *table, const int32_t *out_row, float eps, int32_t n, int32_t k,
                                     int32_t head_dim, int32_t rope_columns, void *stream) {
    const Rope rope{static_cast<bf16 *>(out), static_cast<const float2 *>(table), nullptr, n, head_dim, rope_columns};
    return launch(operands_of(nullptr, x, norm, eps, weight, bias, out_row, n, k), rope, stream);
}
