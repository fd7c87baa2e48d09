// The epilogues of the linear layers on Hopper but gate and up: what becomes of their sums. An epilogue is for the 16 rows of
// a warp from `row` on, of which each thread has some. `staged` is where the sums of a chunk of columns lie, and `side` where
// what belongs to them does: of a matrix of fp32, in boxes of a chunk's columns. Columns from `end` on are nobody's.
//
// For a tile of so many chunks an epilogue wants so many `boxes`, the rows of that matrix from side_row on, each the columns
// from side_column on; box_of is the one that a chunk reads. If kBoxPerChunk, chunk i reads box i alone, which may go then.
#pragma once

#include "gemm_sm90.cuh"
#include "kernels.h"

constexpr int kMostHeadDim = 128;

// Where a warp's sums are turned from the order of the tensor cores into rows: 16 of 32 columns, padded so that the writes of
// a quarter of a warp meet no bank twice.
constexpr int kChunk = 32, kPitchBytes = (kChunk + 8) * 4, kStagingBytes = 16 * kPitchBytes;
// What an epilogue reads is a matrix of fp32, a chunk of columns of which lies in rows of so many bytes.
constexpr int kSideRowBytes = kChunk * 4;
template <class T>
constexpr int kChunksOf = T::n / kChunk;

__device__ inline float4 load_shared(uint32_t address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address));
    return v;
}

__device__ inline void store_shared(uint32_t address, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}

// A value for each of a tile's columns: a lane holds those of two columns, of each 64. Loaded before the product.
template <int kColumns>
struct OfColumns {
    static constexpr int kWords = (kColumns + 63) / 64;
    uint32_t words[kWords];
    // From `from` [n], or zeros if that is null.
    __device__ OfColumns(const bf16 *from, int tile_column, int n) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            const int column = min(tile_column + i * 64 + static_cast<int>(threadIdx.x) % 32 * 2, n - 2);
            words[i] = from ? __ldg(reinterpret_cast<const uint32_t *>(from + column)) : 0;
        }
    }
    // Those of four columns from the tile's column `at` on. All lanes ask at once, with the same at / 64.
    __device__ float4 four(int at) const {
        uint32_t word = words[0];
#pragma unroll
        for (int i = 1; i < kWords; ++i)
            if (at >= i * 64) word = words[i];
        const float2 low = unpack(__shfl_sync(0xffffffffu, word, at % 64 / 2));
        const float2 high = unpack(__shfl_sync(0xffffffffu, word, at % 64 / 2 + 1));
        return {low.x, low.y, high.x, high.y};
    }
};

__device__ inline uint2 pack_four(float4 v) { return {pack(v.x, v.y), pack(v.z, v.w)}; }

// Of two neighbouring lanes with an a and a b each, the even one gets both a, the odd one both b: to be stored as one, for the
// cost of a store is that of the rows it touches.
__device__ inline uint4 exchange(uint2 a, uint2 b) {
    const bool odd = threadIdx.x & 1;
    const uint32_t x = __shfl_xor_sync(0xffffffffu, odd ? a.x : b.x, 1);
    const uint32_t y = __shfl_xor_sync(0xffffffffu, odd ? a.y : b.y, 1);
    return odd ? uint4{x, y, b.x, b.y} : uint4{a.x, a.y, x, y};
}

// Lane i of four neighbours gets the sum of their values i.
__device__ inline float sum_of_quad(const float (&values)[4]) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
    const float low = (odd ? values[1] : values[0]) + __shfl_xor_sync(0xffffffffu, odd ? values[0] : values[1], 1);
    const float high = (odd ? values[3] : values[2]) + __shfl_xor_sync(0xffffffffu, odd ? values[2] : values[3], 1);
    return (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, 2);
}

// a * factor + b
__device__ inline float4 scaled_sum(float4 a, float factor, float4 b) {
    return {a.x * factor + b.x, a.y * factor + b.y, a.z * factor + b.z, a.w * factor + b.w};
}

// Piece `piece` of 16 bytes of a row of a box.
__device__ inline float4 load_side(uint32_t box, int row, int piece) {
    return load_shared(box + row * kSideRowBytes + (piece ^ row % 8) * 16);
}

// Where a row starts. Neither number is negative, which saves a register each.
__device__ inline size_t start_of(int row, int width) {
    return static_cast<size_t>(static_cast<uint32_t>(row)) * static_cast<uint32_t>(width);
}

// Eight threads a row, with four columns each. Squares are summed by chunk, whatever the tile: else a row's sum, and all that
// becomes of it, would depend in its last bits on the tile, and so on the number of rows.
struct AddToStream {
    float *x;
    bf16 *scaled;
    float *squares;
    const bf16 *norm, *bias;
    int slots, n, rows = 0;
    struct OfTile {
        uint2 scaled[4];  // of the chunk before, if that had an even number
    };
    template <int kColumns>
    struct Loaded {
        OfColumns<kColumns> norm, bias;
    };
    __device__ void start(const Schedule &schedule) { rows = schedule.rows; }
    __device__ static int row_of(int i) { return threadIdx.x % 32 / 8 + i * 4; }
    __device__ OfTile load_tile(int) const { return {}; }
    template <int kColumns>
    __device__ Loaded<kColumns> load(int tile_column) const {
        return {{norm, tile_column, n}, {bias, tile_column, n}};
    }
    template <int kColumns>
    __device__ void finish(uint32_t staged, uint32_t side, int row, int tile_column, int chunk, int end, OfTile &of_tile,
                           const Loaded<kColumns> &loaded) const {
        const int part = threadIdx.x % 8, in_tile = chunk * kChunk + part * 4, column = tile_column + in_tile;
        const float4 weights = loaded.norm.four(in_tile);
        float4 sums[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] = load_shared(staged + row_of(i) * kPitchBytes + part * 16);
        if (bias) {
            const float4 bias_four = loaded.bias.four(in_tile);
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[i] = scaled_sum(sums[i], 1.f, bias_four);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] = scaled_sum(load_side(side, row_of(i), part), 1.f, sums[i]);
        const bool inside = column < end, even = chunk % 2 == 0;
        uint2 own[4];
        float squares_of[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float4 sum = sums[i];
            if (inside && row + row_of(i) < rows)
                *reinterpret_cast<float4 *>(x + start_of(row + row_of(i), n) + column) = sum;
            own[i] = pack_four({sum.x * weights.x, sum.y * weights.y, sum.z * weights.z, sum.w * weights.w});
            squares_of[i] = inside ? sum.x * sum.x + sum.y * sum.y + (sum.z * sum.z + sum.w * sum.w) : 0.f;
            if (even) of_tile.scaled[i] = own[i];
        }
        static_assert(kSlotColumns == kChunk);
        const int square_row = row + row_of(part % 4);
        float square = sum_of_quad(squares_of);
        square += __shfl_xor_sync(0xffffffffu, square, 4);
        if (part < 4 && square_row < rows)
            squares[start_of(square_row, slots) + (tile_column + chunk * kChunk) / kSlotColumns] = square;
        // Two chunks of `scaled` make whole lines. A last one without a second has no columns for the odd lanes.
        if (even && tile_column + (chunk + 1) * kChunk < end) return;
        const int pair_column = tile_column + chunk / 2 * (2 * kChunk) + part / 2 * 8 + part % 2 * kChunk;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint4 group = exchange(of_tile.scaled[i], own[i]);
            if (pair_column < end && row + row_of(i) < rows)
                *reinterpret_cast<uint4 *>(scaled + start_of(row + row_of(i), n) + pair_column) = group;
        }
    }
    static constexpr bool kBoxPerChunk = true;
    __device__ int boxes(int chunks) const { return chunks; }
    __device__ int box_of(int, int chunk) const { return chunk; }
    __device__ int side_row(int row) const { return row; }
    __device__ int side_column(int tile_column, int box) const { return tile_column + box * kChunk; }
};

// Four threads a row, two rows each, eight apart. Of them a thread has four columns, and the four that lie eight further.
__device__ inline int quad_row(int i) { return threadIdx.x % 32 / 4 + i * 8; }
__device__ inline int quad_column(int chunk_column) {
    return chunk_column + static_cast<int>(threadIdx.x) % 4 / 2 * 16 + static_cast<int>(threadIdx.x) % 2 * 4;
}
struct QuadSums {
    float4 low, high;
};
__device__ inline QuadSums quad_sums(uint32_t staged, int i, float factor, const QuadSums &bias) {
    const uint32_t at = staged + quad_row(i) * kPitchBytes + quad_column(0) * 4;
    return {scaled_sum(load_shared(at), factor, bias.low), scaled_sum(load_shared(at + 32), factor, bias.high)};
}

// Heads in the columns below rope_columns are rotated by angles that come as cosines and sines by turns, [positions,
// head_dim].
struct RotateHeads {
    bf16 *out;
    const bf16 *bias;
    RowNorm norm;
    GleanerStarts starts;
    int head_dim, rope_columns, n, rows = 0, row_start = 0, position_start = 0, out_start = 0;
    struct OfTile {
        float factors[2];
    };
    template <int kColumns>
    using Loaded = OfColumns<kColumns>;
    __device__ void start(const Schedule &schedule) {
        rows = schedule.rows, row_start = schedule.row_start;
        position_start = start_of_rows(starts.position), out_start = start_of_rows(starts.out);
    }
    __device__ OfTile load_tile(int row) const {
        OfTile of_tile;
        norm.factors(of_tile.factors,
                     {row_start + min(row + quad_row(0), rows - 1), row_start + min(row + quad_row(1), rows - 1)});
        return of_tile;
    }
    template <int kColumns>
    __device__ Loaded<kColumns> load(int tile_column) const {
        return {bias, tile_column, n};
    }
    template <int kColumns>
    __device__ void finish(uint32_t staged, uint32_t side, int row, int tile_column, int chunk, int end, OfTile &of_tile,
                           const Loaded<kColumns> &of_bias) const {
        const int in_tile = quad_column(chunk * kChunk), column = tile_column + in_tile, piece = threadIdx.x % 4 * 2;
        const int group_column = tile_column + chunk * kChunk + static_cast<int>(threadIdx.x) % 4 * 8;
        const QuadSums bias_sums{of_bias.four(in_tile), of_bias.four(in_tile + 8)};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const auto [low, high] = quad_sums(staged, i, of_tile.factors[i], bias_sums);
            float4 a = load_side(side, quad_row(i), piece), b = load_side(side, quad_row(i), piece + 1);
            if (column >= rope_columns) a = b = {1.f, 0.f, 1.f, 0.f};
            const uint4 group = exchange(pack_four({low.x * a.x - high.x * a.y, low.y * a.z - high.y * a.w,
                                                    low.z * b.x - high.z * b.y, low.w * b.z - high.w * b.w}),
                                         pack_four({high.x * a.x + low.x * a.y, high.y * a.z + low.y * a.w,
                                                    high.z * b.x + low.z * b.y, high.w * b.z + low.w * b.w}));
            if (row + quad_row(i) < rows && group_column < end)
                *reinterpret_cast<uint4 *>(out + start_of(out_start + row + quad_row(i), n) + group_column) = group;
        }
    }
    // All heads are rotated by the same angles: a box for each chunk of a head will do.
    static constexpr bool kBoxPerChunk = false;
    __device__ int boxes(int) const { return head_dim / kChunk; }
    __device__ int box_of(int tile_column, int chunk) const {
        return (tile_column / kChunk + chunk) & (head_dim / kChunk - 1);
    }
    __device__ int side_row(int row) const { return position_start + row; }
    __device__ int side_column(int, int box) const { return box * kChunk; }
};
