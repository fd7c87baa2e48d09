// Causal grouped-query attention with an optional sliding window, in the manner of FlashAttention-2 on the tensor cores
// of sm_80: 64 query rows and one head a CTA, 16 rows a warp, keys in tiles of 64, online softmax in base 2.
//
// Rows of a tile are stored as 16-byte pieces; piece p of row r lies in slot p ^ (r % 8), so that the eight rows that
// one ldmatrix reads lie in different banks. Rows beyond the live count are read as zeros and never written. Blocks of rows
// start at multiples of 64 whichever row is the first: those before it are computed, for their block is, and not written.
#include "common.cuh"
#include "kernels.h"

namespace {

constexpr int kRows = 64, kKeys = 64, kThreads = 128;

struct Args {
    bf16 *out;        // [rows - first_row, num_heads * head_dim]
    const bf16 *qkv;  // [rows, (num_heads + 2 * num_kv_heads) * head_dim]
    const int32_t *rows, *first_row;
    int num_heads, num_kv_heads;
    int window;         // keys a row may attend to, itself included; 0 for all
    float scale_log2;  // 1 / sqrt(head_dim), in base 2
};

template <int kHeadDim>
__device__ uint32_t slot(int row, int piece) {
    return row * (kHeadDim * 2) + ((piece ^ (row % 8)) * 16);
}

// Starts the copy of 64 rows of one head into shared memory.
template <int kHeadDim>
__device__ void load_tile(uint32_t to, const bf16 *from, int first_row, int rows, int stride) {
    constexpr int kPieces = kHeadDim / 8;
#pragma unroll
    for (int i = 0; i < kRows * kPieces / kThreads; ++i) {
        const int index = i * kThreads + threadIdx.x;
        const int row = index / kPieces, piece = index % kPieces;
        const bool valid = first_row + row < rows;
        copy_async(to + slot<kHeadDim>(row, piece),
                   valid ? from + static_cast<size_t>(first_row + row) * stride + piece * 8 : from, valid);
    }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads) attention_kernel(Args args) {
    constexpr int kTileBytes = kRows * kHeadDim * 2;
    constexpr int kSteps = kHeadDim / 16;  // of 16 dimensions
    const int rows = *args.rows, first_row = start_of_rows(args.first_row);
    // The longest rows first: they have the most keys.
    const int m0 = first_row / kRows * kRows + (gridDim.y - 1 - blockIdx.y) * kRows;
    if (m0 >= rows) return;
    extern __shared__ __align__(128) unsigned char shared[];
    const uint32_t shared_q = shared_address(shared);
    const uint32_t shared_k = shared_q + kTileBytes, shared_v = shared_k + 2 * kTileBytes;
    const int head = blockIdx.x, kv_head = head / (args.num_heads / args.num_kv_heads);
    const int stride = (args.num_heads + 2 * args.num_kv_heads) * kHeadDim;
    const bf16 *q = args.qkv + head * kHeadDim;
    const bf16 *k = args.qkv + (args.num_heads + kv_head) * kHeadDim;
    const bf16 *v = k + args.num_kv_heads * kHeadDim;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    const int first_key = args.window ? max(0, m0 + 1 - args.window) : 0;
    const int first_tile = first_key / kKeys, last_tile = min(m0 + kRows, rows) - 1;
    const int tiles = last_tile / kKeys - first_tile + 1;
    auto load_keys = [&](int tile) {
        const int row = (first_tile + tile) * kKeys;
        load_tile<kHeadDim>(shared_k + tile % 2 * kTileBytes, k, row, rows, stride);
        load_tile<kHeadDim>(shared_v + tile % 2 * kTileBytes, v, row, rows, stride);
        copy_commit();
    };
    load_tile<kHeadDim>(shared_q, q, m0, rows, stride);
    load_keys(0);

    uint32_t q_fragments[kSteps][4];
    float out[kHeadDim / 8][4] = {};
    float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {};
    for (int tile = 0; tile < tiles; ++tile) {
        copy_wait<0>();
        __syncthreads();
        if (tile == 0) {
#pragma unroll
            for (int step = 0; step < kSteps; ++step)
                load_matrices(q_fragments[step],
                              shared_q + slot<kHeadDim>(warp * 16 + lane % 16, step * 2 + lane / 16));
        }
        // Fills the half that was read in the round before.
        if (tile + 1 < tiles) load_keys(tile + 1);

        float scores[kKeys / 8][4] = {};
        const uint32_t tile_k = shared_k + tile % 2 * kTileBytes;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
            for (int j = 0; j < kKeys / 16; ++j) {
                uint32_t b[4];
                load_matrices(b, tile_k + slot<kHeadDim>(j * 16 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
                mma(scores[2 * j], q_fragments[step], b[0], b[1]);
                mma(scores[2 * j + 1], q_fragments[step], b[2], b[3]);
            }
        }

        const int key0 = (first_tile + tile) * kKeys;
        const bool masked = key0 + kKeys > m0 || (args.window && key0 < m0 + kRows - args.window);
        if (masked) {
#pragma unroll
            for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int row = m0 + warp * 16 + i / 2 * 8 + lane / 4;
                    const int key = key0 + j * 8 + lane % 4 * 2 + i % 2;
                    if (key > row || (args.window && key <= row - args.window)) scores[j][i] = -INFINITY;
                }
            }
        }

#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float tile_max = row_max[half];
#pragma unroll
            for (int j = 0; j < kKeys / 8; ++j)
                tile_max = fmaxf(tile_max, fmaxf(scores[j][half * 2], scores[j][half * 2 + 1]));
            tile_max = fmaxf(tile_max, __shfl_xor_sync(0xffffffffu, tile_max, 1));
            tile_max = fmaxf(tile_max, __shfl_xor_sync(0xffffffffu, tile_max, 2));
            // A row whose keys so far are all masked has no maximum to subtract.
            const float base = tile_max == -INFINITY ? 0.f : tile_max * args.scale_log2;
            const float rescale = exp2_fast(row_max[half] * args.scale_log2 - base);
            row_max[half] = tile_max;
            float sum = 0.f;
#pragma unroll
            for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
                for (int i = half * 2; i < half * 2 + 2; ++i) {
                    scores[j][i] = exp2_fast(scores[j][i] * args.scale_log2 - base);
                    sum += scores[j][i];
                }
            }
            row_sum[half] = row_sum[half] * rescale + sum;
#pragma unroll
            for (int d = 0; d < kHeadDim / 8; ++d) {
                out[d][half * 2] *= rescale;
                out[d][half * 2 + 1] *= rescale;
            }
        }

        const uint32_t tile_v = shared_v + tile % 2 * kTileBytes;
#pragma unroll
        for (int step = 0; step < kKeys / 16; ++step) {
            const float(&left)[4] = scores[2 * step], (&right)[4] = scores[2 * step + 1];
            const uint32_t p[4] = {pack(left[0], left[1]), pack(left[2], left[3]), pack(right[0], right[1]),
                                   pack(right[2], right[3])};
#pragma unroll
            for (int d = 0; d < kHeadDim / 16; ++d) {
                uint32_t b[4];
                load_matrices_transposed(
                    b, tile_v + slot<kHeadDim>(step * 16 + lane / 8 % 2 * 8 + lane % 8, d * 2 + lane / 16));
                mma(out[2 * d], p, b[0], b[1]);
                mma(out[2 * d + 1], p, b[2], b[3]);
            }
        }
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float sum = row_sum[half];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        const int row = m0 + warp * 16 + half * 8 + lane / 4;
        if (row < first_row || row >= rows) continue;
        bf16 *to = args.out + (static_cast<size_t>(row - first_row) * args.num_heads + head) * kHeadDim + lane % 4 * 2;
#pragma unroll
        for (int d = 0; d < kHeadDim / 8; ++d)
            *reinterpret_cast<uint32_t *>(to + d * 8) = pack(out[d][half * 2] / sum, out[d][half * 2 + 1] / sum);
    }
}

template <int kHeadDim>
int32_t launch(const Args &args, int max_rows, void *stream) {
    constexpr int kSharedBytes = 5 * kRows * kHeadDim * 2;
    const cudaError_t status = cudaFuncSetAttribute(attention_kernel<kHeadDim>,
                                                    cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (status != cudaSuccess) return status;
    const dim3 grid(args.num_heads, (max_rows + kRows - 1) / kRows);
    attention_kernel<kHeadDim><<<grid, kThreads, kSharedBytes, static_cast<cudaStream_t>(stream)>>>(args);
    return cudaGetLastError();
}

}  // namespace

extern "C" int32_t gleaner_attention(void *out, const void *qkv, const int32_t *rows, const int32_t *first_row,
                                     int32_t max_rows, int32_t num_heads, int32_t num_kv_heads, int32_t head_dim,
                                     int32_t window, void *stream) {
    const float log2_e = 1.4426950408889634f;
    const Args args{static_cast<bf16 *>(out), static_cast<const bf16 *>(qkv), rows, first_row, num_heads, num_kv_heads,
                    window, log2_e / sqrtf(static_cast<float>(head_dim))};
    switch (head_dim) {
        case 64: return launch<64>(args, max_rows, stream);
        case 128: return launch<128>(args, max_rows, stream);
        default: return cudaErrorInvalidValue;
    }
}
