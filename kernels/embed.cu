// The embedding of a prompt: the residual stream's beginning. One CTA a row, eight columns a thread.
#include "kernels.h"
#include "stream.cuh"

namespace {

constexpr int kThreads = 128;

struct Stream {
    uint4 *scaled, *rest;
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
        uint32_t scaled[4], rest[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const float2 x = unpack(values[w]), factor = unpack(stream_weights(factors[w]));
            sum += x.x * x.x + x.y * x.y;
            split_pair(x.x * factor.x, x.y * factor.y, scaled[w], rest[w]);
        }
        stream.scaled[to + i] = {scaled[0], scaled[1], scaled[2], scaled[3]};
        stream.rest[to + i] = {rest[0], rest[1], rest[2], rest[3]};
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

extern "C" int32_t gleaner_embed(void *scaled, void *rest, float *squares, const uint32_t *prompt, const void *embedding,
                                 const void *norm, const int32_t *rows, const int32_t *first_row, int32_t max_rows,
                                 int32_t width, void *stream) {
    const Stream to{static_cast<uint4 *>(scaled), static_cast<uint4 *>(rest), squares, GLEANER_SQUARES(width)};
    embed_kernel<<<max_rows, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        to, prompt, static_cast<const uint4 *>(embedding), static_cast<const uint4 *>(norm), rows, first_row,
        width / 8);
    return cudaGetLastError();
}
