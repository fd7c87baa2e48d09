// RMSNorm over rows. A warp a row; 16-byte loads; the row is read twice, the second time from L1.
#include "common.cuh"
#include "kernels.h"

namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kVector = 8;  // bf16 elements of a 16-byte load

union Vector {
    uint4 bits;
    __nv_bfloat162 pairs[kVector / 2];
};

__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(uint4 *__restrict__ out, const uint4 *__restrict__ x, const uint4 *__restrict__ weight,
                    const int32_t *rows, int hidden_size, float eps) {
    const int row = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= *rows) return;
    const int vectors = hidden_size / kVector;
    const size_t first = static_cast<size_t>(row) * vectors;

    float sum = 0.f;
    for (int i = lane; i < vectors; i += 32) {
        Vector v{x[first + i]};
        for (auto pair : v.pairs) {
            const float2 f = __bfloat1622float2(pair);
            sum += f.x * f.x + f.y * f.y;
        }
    }
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    const float scale = rsqrtf(sum / hidden_size + eps);

    for (int i = lane; i < vectors; i += 32) {
        Vector v{x[first + i]}, w{weight[i]};
        for (int p = 0; p < kVector / 2; ++p) {
            const float2 f = __bfloat1622float2(v.pairs[p]), g = __bfloat1622float2(w.pairs[p]);
            v.pairs[p] = __floats2bfloat162_rn(f.x * scale * g.x, f.y * scale * g.y);
        }
        out[first + i] = v.bits;
    }
}

}  // namespace

extern "C" int32_t gleaner_rms_norm(void *out, const void *x, const void *weight, const int32_t *rows,
                                    int32_t max_rows, int32_t hidden_size, float eps, void *stream) {
    rms_norm_kernel<<<(max_rows + kWarps - 1) / kWarps, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<uint4 *>(out), static_cast<const uint4 *>(x), static_cast<const uint4 *>(weight), rows, hidden_size,
        eps);
    return cudaGetLastError();
}
