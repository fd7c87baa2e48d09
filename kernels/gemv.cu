// out = epilogue(a w^T) for one row: the linear layers of decoding, bound by the bytes of the weight. A warp makes four
// columns, those that an epilogue wants together; each lane reads 16 bytes of the weight at a time.
#include "common.cuh"
#include "epilogue.cuh"
#include "kernels.h"

namespace {

constexpr int kThreads = 256;
constexpr int kColumns = 4;  // of a warp

struct Logits {
    float *out;
    using Loaded = Nothing;
    __device__ Nothing load(int, int) const { return {}; }
    __device__ void operator()(int, int column, const float (&low)[2], const float (&high)[2], Nothing) const {
        *reinterpret_cast<float2 *>(out + column) = {low[0], low[1]};
        *reinterpret_cast<float2 *>(out + column + 8) = {high[0], high[1]};
    }
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

template <class Epilogue>
__global__ void __launch_bounds__(kThreads)
    gemv_kernel(const uint4 *__restrict__ a, const uint4 *__restrict__ weight, const bf16 *__restrict__ bias,
                const int32_t *out_row, int n, int vectors, Epilogue epilogue) {
    const int warp = (blockIdx.x * kThreads + threadIdx.x) / 32, lane = threadIdx.x % 32;
    const int column = warp / 4 * 16 + warp % 4 * 2;
    if (column >= n) return;
    const int columns[kColumns] = {column, column + 1, column + 8, column + 9};
    float sums[kColumns] = {};
    for (int i = lane; i < vectors; i += 32) {
        const uint4 x = a[i];
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
            sums[c] = dot(x, weight[static_cast<size_t>(columns[c]) * vectors + i], sums[c]);
    }
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
        for (int offset = 16; offset > 0; offset /= 2) sums[c] += __shfl_xor_sync(0xffffffffu, sums[c], offset);
        if (bias) sums[c] += __bfloat162float(bias[columns[c]]);
    }
    if (lane > 0) return;
    const float low[2] = {sums[0], sums[1]}, high[2] = {sums[2], sums[3]};
    const int row = out_row ? *out_row : 0;
    epilogue(row, column, low, high, epilogue.load(row, column));
}

template <class Epilogue>
int32_t launch(const Epilogue &epilogue, const void *a, const void *weight, const void *bias, const int32_t *out_row,
               int32_t n, int32_t k, void *stream) {
    const int warps = n / kColumns, blocks = (warps * 32 + kThreads - 1) / kThreads;
    gemv_kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const uint4 *>(a), static_cast<const uint4 *>(weight), static_cast<const bf16 *>(bias), out_row, n,
        k / 8, epilogue);
    return cudaGetLastError();
}

}  // namespace

extern "C" int32_t gleaner_gemv_logits(float *out, const void *a, const void *weight, int32_t n, int32_t k,
                                       void *stream) {
    return launch(Logits{out}, a, weight, nullptr, nullptr, n, k, stream);
}

extern "C" int32_t gleaner_gemv_residual(void *x, const void *a, const void *weight, const void *bias, int32_t n,
                                         int32_t k, void *stream) {
    return launch(Residual{static_cast<bf16 *>(x), n}, a, weight, bias, nullptr, n, k, stream);
}

extern "C" int32_t gleaner_gemv_swiglu(void *out, const void *a, const void *weight, const void *bias, int32_t n,
                                       int32_t k, void *stream) {
    return launch(SwiGlu{static_cast<bf16 *>(out), n / 2}, a, weight, bias, nullptr, n, k, stream);
}

extern "C" int32_t gleaner_gemv_rope(void *out, const void *a, const void *weight, const void *bias, const void *table,
                                     const int32_t *out_row, int32_t n, int32_t k, int32_t head_dim,
                                     int32_t rope_columns, void *stream) {
    const Rope rope{static_cast<bf16 *>(out), static_cast<const float2 *>(table), nullptr, n, head_dim, rope_columns};
    return launch(rope, a, weight, bias, out_row, n, k, stream);
}
