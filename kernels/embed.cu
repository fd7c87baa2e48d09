// The embedding of a prompt: the residual stream's beginning. One CTA a row, eight columns a thread.
#include "common.cuh"
#include "kernels.h"

namespace {

constexpr int kThreads = 128;

struct Stream {
    float4 *x;
    uint4 *scaled;
    float *squares;
    int slots;
};

__global__ void __launch_bounds__(kThreads)
    embed_kernel(const Stream stream, const uint32_t *prompt, const uint4 *__restrict__ embedding,
                 const uint4 *__restrict__ norm, const int32_t *rows, const int32_t *first_row, int vectors) {
    __shared__ float warp_sums[kThreads / 32];
    if (static_cast<int>(blockIdx.x) >= *rows) return;
    const size_t from = static_cast<size_t>(prompt[start_of_rows(first_row) + blockIdx.x]) * vectors;
    const size_t to = static_cast<size_t>(blockIdx.x) * vectors;
    float sum = 0.f;
    for (int i = threadIdx.x; i < vectors; i += kThreads) {
        const uint4 row = embedding[from + i], weights = norm[i];
        const uint32_t values[4] = {row.x, row.y, row.z, row.w}, factors[4] = {weights.x, weights.y, weights.z, weights.w};
        float2 x[4];
        uint32_t scaled[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const float2 factor = unpack(factors[w]);
            x[w] = unpack(values[w]);
            sum += x[w].x * x[w].x + x[w].y * x[w].y;
            scaled[w] = pack(x[w].x * factor.x, x[w].y * factor.y);
        }
        stream.x[(to + i) * 2] = {x[0].x, x[0].y, x[1].x, x[1].y};
        stream.x[(to + i) * 2 + 1] = {x[2].x, x[2].y, x[3].x, x[3].y};
        stream.scaled[to + i] = {scaled[0], scaled[1], scaled[2], scaled[3]};
    }
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.f;
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += warp_sums[warp];
    for (int slot = threadIdx.x; slot < stream.slots; slot += kThreads)
        stream.squares[static_cast<size_t>(blockIdx.x) * stream.slots + slot] = slot == 0 ? sum : 0.f;
}

}  // namespace

extern "C" int32_t gleaner_embed(float *x, void *scaled, float *squares, const uint32_t *prompt, const void *embedding,
                                 const void *norm, const int32_t *rows, const int32_t *first_row, int32_t max_rows,
                                 int32_t width, void *stream) {
    const Stream to{reinterpret_cast<float4 *>(x), static_cast<uint4 *>(scaled), squares, GLEANER_SQUARES(width)};
    embed_kernel<<<max_rows, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        to, prompt, static_cast<const uint4 *>(embedding), static_cast<const uint4 *>(norm), rows, first_row,
        width / 8);
    return cudaGetLastError();
}
