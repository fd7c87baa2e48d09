// The embedding of a prompt: one CTA a row, 16 bytes a thread.
#include "common.cuh"
#include "kernels.h"

namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads)
    embed_kernel(uint4 *__restrict__ x, const uint32_t *prompt, const uint4 *__restrict__ embedding,
                 const int32_t *rows, int vectors) {
    if (static_cast<int>(blockIdx.x) >= *rows) return;
    const size_t from = static_cast<size_t>(prompt[blockIdx.x]) * vectors;
    const size_t to = static_cast<size_t>(blockIdx.x) * vectors;
    for (int i = threadIdx.x; i < vectors; i += kThreads) x[to + i] = embedding[from + i];
}

}  // namespace

extern "C" int32_t gleaner_embed(void *x, const uint32_t *prompt, const void *embedding, const int32_t *rows,
                                 int32_t max_rows, int32_t hidden_size, void *stream) {
    embed_kernel<<<max_rows, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<uint4 *>(x), prompt, static_cast<const uint4 *>(embedding), rows, hidden_size / 8);
    return cudaGetLastError();
}
