// Queries, keys and values of one row. A CTA makes 16 columns, each of its warps from 64 of the row's: all weights are on
// their way before the row is there.
#include "kernels.h"
#include "row_sm90.cuh"

namespace {

constexpr int kMaxWarps = 16;

struct Args {
    FixedRow row;
    const uint32_t *norm;
    const uint4 *weight;
    const bf16 *bias;
    const float2 *table;
    const int32_t *out_row;
    bf16 *out;
    int n, vectors, head_dim, rope_columns;
    float eps;
};

__global__ void __launch_bounds__(kMaxWarps * 32) row_qkv_kernel(const Args args) {
    extern __shared__ uint4 halves[];  // [2][vectors]
    __shared__ float squares[kMaxWarps], parts[kMaxWarps][16];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    start_next();
    // The order of the columns in a product is free: lane % 4 takes a piece of eight, in each of two.
    const uint4 *from = args.weight + static_cast<size_t>(blockIdx.x * 16 + lane / 4) * args.vectors + warp * 8 + lane % 4;
    uint4 low[2], high[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) low[j] = __ldcs(from + j * 4), high[j] = __ldcs(from + 8 * args.vectors + j * 4);
    const float2 norm = unpack(args.norm[threadIdx.x]);
    const int column = blockIdx.x * 16 + threadIdx.x, position = __ldcg(args.out_row);
    float2 angle = {1.f, 0.f};
    float bias = 0.f;
    if (threadIdx.x < 16) {
        const int in_head = column & (args.head_dim - 1);
        if (column < args.rope_columns)
            angle = args.table[static_cast<size_t>(position) * (args.head_dim / 2) + in_head / 16 * 8 + in_head % 8];
        if (args.bias) bias = __bfloat162float(args.bias[column]);
    }
    wait_for_previous();
    longlong2 fixed = __ldcg(reinterpret_cast<const longlong2 *>(args.row.x) + threadIdx.x);
#pragma unroll
    for (int i = 0; i < kAddedSums; ++i) {
        const longlong2 added = __ldcg(reinterpret_cast<const longlong2 *>(args.row.added + i * args.vectors * 8) + threadIdx.x);
        fixed.x += added.x, fixed.y += added.y;
    }
    const float2 x = {from_fixed(fixed.x), from_fixed(fixed.y)};
    split_row(reinterpret_cast<uint32_t *>(halves), reinterpret_cast<uint32_t *>(halves + args.vectors), x, norm);
    // Columns of the product by turns of the upper and the lower halves.
    float c[4] = {};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        const uint4 b = halves[lane / 4 % 2 * args.vectors + warp * 8 + j * 4 + lane % 4];
        const uint32_t first[4] = {low[j].x, high[j].x, low[j].y, high[j].y};
        const uint32_t second[4] = {low[j].z, high[j].z, low[j].w, high[j].w};
        mma(c, first, b.x, b.y);
        mma(c, second, b.z, b.w);
    }
    sum_squares(squares, x);
    if (lane % 4 == 0) parts[warp][lane / 4] = c[0] + c[1], parts[warp][lane / 4 + 8] = c[2] + c[3];
    __syncthreads();
    if (threadIdx.x >= 16) return;
    float sum = 0.f, square = 0.f;
    // All asked for at once.
#pragma unroll
    for (int w = 0; w < kMaxWarps; ++w)
        if (w < warps) sum += parts[w][threadIdx.x], square += squares[w];
    sum = sum * rsqrtf(square / (args.vectors * 8) + args.eps) + bias;
    const float partner = __shfl_xor_sync(0xffffu, sum, 8);
    sum = sum * angle.x + (threadIdx.x < 8 ? -partner : partner) * angle.y;
    args.out[static_cast<size_t>(position) * args.n + column] = __float2bfloat16(sum);
}

}  // namespace

extern "C" int32_t gleaner_row_sm90_qkv(void *out, const int64_t *row, const void *norm, const void *weight,
                                        const void *bias, const void *table, const int32_t *out_row, float eps,
                                        int32_t n, int32_t k, int32_t head_dim, int32_t rope_columns, void *stream) {
    const Args args{fixed_row(row, k),
                    static_cast<const uint32_t *>(norm),
                    static_cast<const uint4 *>(weight),
                    static_cast<const bf16 *>(bias),
                    static_cast<const float2 *>(table),
                    out_row,
                    static_cast<bf16 *>(out),
                    n,
                    k / 8,
                    head_dim,
                    rope_columns,
                    eps};
    return launch_row(row_qkv_kernel, n / 16, k / 2, k * 4, stream, args);
}
