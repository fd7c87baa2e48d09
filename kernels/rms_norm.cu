// RMSNorm over rows. One CTA a row; 16-byte loads; the row is read twice, the second time from L1.
#include <cuda_bf16.h>

#include "kernels.h"

namespace {

constexpr int kThreads = 128;
constexpr int kVector = 8;  // bf16 elements of a 16-byte load

union Vector {
    uint4 bits;
    __nv_bfloat162 pairs[kVector / 2];
};

// Sum over the CTA, the same in every thread. The order of additions is fixed.
__device__ float block_sum(float value) {
    __shared__ float warp_sums[kThreads / 32];
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = value;
    __syncthreads();
    float sum = 0.f;
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += warp_sums[warp];
    return sum;
}

__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(uint4 *__restrict__ out, const uint4 *__restrict__ x, const uint4 *__restrict__ weight,
                    const int32_t *rows, int hidden_size, float eps) {
    if (static_cast<int>(blockIdx.x) >= *rows) return;
    const int vectors = hidden_size / kVector;
    const size_t row = static_cast<size_t>(blockIdx.x) * vectors;

    float sum = 0.f;
    for (int i = threadIdx.x; i < vectors; i += kThreads) {
        Vector v{x[row + i]};
        for (auto pair : v.pairs) {
            const float2 f = __bfloat1622float2(pair);
            sum += f.x * f.x + f.y * f.y;
        }
    }
    const float scale = rsqrtf(block_sum(sum) / hidden_size + eps);

    for (int i = threadIdx.x; i < vectors; i += kThreads) {
        Vector v{x[row + i]}, w{weight[i]};
        for (int p = 0; p < kVector / 2; ++p) {
            const float2 f = __bfloat1622float2(v.pairs[p]), g = __bfloat1622float2(w.pairs[p]);
            v.pairs[p] = __floats2bfloat162_rn(f.x * scale * g.x, f.y * scale * g.y);
        }
        out[row + i] = v.bits;
    }
}

}  // namespace

extern "C" int32_t gleaner_rms_norm(void *out, const void *x, const void *weight, const int32_t *rows,
                                    int32_t max_rows, int32_t hidden_size, float eps, void *stream) {
    rms_norm_kernel<<<max_rows, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<uint4 *>(out), static_cast<const uint4 *>(x), static_cast<const uint4 *>(weight), rows, hidden_size,
        eps);
    return cudaGetLastError();
}
