// One row of the residual stream as it is: where a token of an answer takes over from its prompt.
#include "kernels.h"
#include "stream.cuh"

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    stream_row_kernel(float2 *x, const uint32_t *scaled, const uint32_t *rest, const uint32_t *norm, int pairs) {
    const int pair = blockIdx.x * kThreads + threadIdx.x;
    if (pair >= pairs) return;
    const float2 of_norm = join_pair(scaled[pair], rest[pair]), by = unpack(stream_weights(norm[pair]));
    x[pair] = {of_norm.x * reciprocal(by.x), of_norm.y * reciprocal(by.y)};
}

}  // namespace

extern "C" int32_t gleaner_stream_row(float *x, const void *scaled, const void *rest, const void *norm, int32_t row,
                                      int32_t width, void *stream) {
    const int pairs = width / 2;
    const size_t start = static_cast<size_t>(row) * pairs;
    stream_row_kernel<<<(pairs + kThreads - 1) / kThreads, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
        reinterpret_cast<float2 *>(x), static_cast<const uint32_t *>(scaled) + start,
        static_cast<const uint32_t *>(rest) + start, static_cast<const uint32_t *>(norm), pairs);
    return cudaGetLastError();
}
