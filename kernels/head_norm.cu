// Qwen3: RMSNorm on each head of q and k, then the rotation, in place; a warp a head. Dimensions come as 8 of the lower
// half, 8 of the upper, and so on, in the heads as in the weights.
#include "common.cuh"
#include "kernels.h"

namespace {

constexpr int kThreads = 128;

struct Args {
    bf16 *x;  // [*, stride]
    const bf16 *q_norm, *k_norm;
    const float2 *table;
    const int32_t *rows, *row_start, *first_row;
    int stride, q_heads, heads, head_dim;
    float eps;
};

__global__ void __launch_bounds__(kThreads) head_norm_kernel(Args args) {
    const int row = blockIdx.x, lane = threadIdx.x % 32;
    if (row >= *args.rows) return;
    const int x_row = row + start_of_rows(args.first_row);
    const int position = x_row + start_of_rows(args.row_start);
    const int pairs = args.head_dim / 2;
    const float2 *angles = args.table + static_cast<size_t>(position) * pairs;
    for (int head = threadIdx.x / 32; head < args.heads; head += kThreads / 32) {
        bf16 *x = args.x + static_cast<size_t>(x_row) * args.stride + head * args.head_dim;
        const bf16 *weight = head < args.q_heads ? args.q_norm : args.k_norm;
        float sum = 0.f;
        for (int d = lane; d < args.head_dim; d += 32) {
            const float value = __bfloat162float(x[d]);
            sum += value * value;
        }
        for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        const float scale = rsqrtf(sum / args.head_dim + args.eps);
        for (int p = lane; p < pairs; p += 32) {
            const int at = p / 8 * 16 + p % 8;
            const float low = __bfloat162float(x[at]) * scale * __bfloat162float(weight[at]);
            const float high = __bfloat162float(x[at + 8]) * scale * __bfloat162float(weight[at + 8]);
            x[at] = __float2bfloat16(low * angles[p].x - high * angles[p].y);
            x[at + 8] = __float2bfloat16(high * angles[p].x + low * angles[p].y);
        }
    }
}

}  // namespace

extern "C" int32_t gleaner_head_norm(void *x, const void *q_norm, const void *k_norm, const void *table,
                                     const int32_t *rows, const int32_t *row_start, const int32_t *first_row,
                                     int32_t max_rows, int32_t stride, int32_t q_heads, int32_t heads, int32_t head_dim,
                                     float eps, void *stream) {
    const Args args{static_cast<bf16 *>(x), static_cast<const bf16 *>(q_norm), static_cast<const bf16 *>(k_norm),
                    static_cast<const float2 *>(table), rows, row_start, first_row, stride, q_heads, heads, head_dim,
                    eps};
    head_norm_kernel<<<max_rows, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(args);
    return cudaGetLastError();
}
