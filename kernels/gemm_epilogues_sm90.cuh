// The epilogues of the linear layers on Hopper but gate and up: what becomes of their sums. A warp has those of 16 rows from
// `row` on, and finishes them in passes of kPassRows rows and a chunk of kChunk columns, `half` which of two passes of 8 rows.
// `staged` is where the sums of a pass lie. Columns before `begin` and from `end` on are nobody's.
//
// What else an epilogue reads comes in boxes of 128 bytes of each of a tile's rows: so many `boxes` of the matrix side_matrix,
// from side_row and side_column on, two a stage. If kPairPerChunk, chunk i reads boxes 2 i and 2 i + 1 alone, which may go
// then. box_at gives where one lies, from the warp's first row on.
#pragma once

#include "gemm_sm90.cuh"
#include "kernels.h"

constexpr int kMostHeadDim = 128;

// Where a warp's sums are turned from the order of the tensor cores into rows, padded so that the writes of a quarter of a warp
// meet no bank twice. Of the pieces of 16 bytes of a row of 64 columns the last eight are swapped, by swapped(), so that every
// other of them meet none either.
template <class Epilogue>
constexpr int kPitchBytes = (Epilogue::kChunk + 8) * 4;
template <class Epilogue>
constexpr int kStagingBytes = Epilogue::kPassRows * kPitchBytes<Epilogue>;
__host__ __device__ constexpr int swapped(int piece) { return piece ^ piece / 8 * 3; }

// Where chunks are of 64 columns, every other tile of 160 begins in the middle of a line, and every other one of 112 in the middle
// of 32 columns whose squares are summed together. The first chunk begins with those, so many columns before the tile.
template <class T, class Epilogue>
constexpr int kMostBefore = Epilogue::kChunk < 64 ? 0 : T::n % 64 == 32 ? 32 : T::n % 32;
template <class T, class Epilogue>
__device__ int columns_before(int tile_column) {
    constexpr int kMost = kMostBefore<T, Epilogue>;
    if constexpr (kMost == 0) {
        return 0;
    } else {
        static_assert(T::n % (2 * kMost) == kMost);
        return tile_column % (2 * kMost);
    }
}

constexpr int kSideRowBytes = 128;
template <class T>
constexpr int kSideBoxBytes = T::m * kSideRowBytes;

__device__ inline float4 load_shared(uint32_t address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address));
    return v;
}

__device__ inline uint4 load_words(uint32_t address) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
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
    // For weights of a norm.
    __device__ OfColumns of_stream() const {
        OfColumns weights = *this;
#pragma unroll
        for (uint32_t &word : weights.words) word = stream_weights(word);
        return weights;
    }
    // So many words of two columns each, from column `at` of the 64 of number `which` on. All lanes ask at once, for the same 64.
    template <int kCount>
    __device__ void words_at(uint32_t (&of)[kCount], int which, int at) const {
        uint32_t word = words[0];
#pragma unroll
        for (int i = 1; i < kWords; ++i)
            if (which >= i) word = words[i];
#pragma unroll
        for (int i = 0; i < kCount; ++i) of[i] = __shfl_sync(0xffffffffu, word, at / 2 + i);
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

// Of two neighbouring lanes, the even one gets the sum of their values 0, the odd one that of their values 1.
__device__ inline float sum_of_pair(const float (&values)[2]) {
    const bool odd = threadIdx.x & 1;
    return (odd ? values[1] : values[0]) + __shfl_xor_sync(0xffffffffu, odd ? values[0] : values[1], 1);
}

// As unpack, in two instructions instead of three. Not for all kernels: row_qkv became slower by it.
__device__ inline float2 unpack_by_shifts(uint32_t bits) {
    return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000)};
}
__device__ inline float4 unpack_four(uint32_t low, uint32_t high) {
    const float2 a = unpack_by_shifts(low), b = unpack_by_shifts(high);
    return {a.x, a.y, b.x, b.y};
}
__device__ inline float4 join_four(uint32_t scaled_low, uint32_t scaled_high, uint32_t rest_low, uint32_t rest_high) {
    const float2 a = join_pair(scaled_low, rest_low), b = join_pair(scaled_high, rest_high);
    return {a.x, a.y, b.x, b.y};
}
__device__ inline float square(float4 v) { return v.x * v.x + v.y * v.y + (v.z * v.z + v.w * v.w); }

// a * factor + b
__device__ inline float4 scaled_sum(float4 a, float4 factor, float4 b) {
    return {a.x * factor.x + b.x, a.y * factor.y + b.y, a.z * factor.z + b.z, a.w * factor.w + b.w};
}
__device__ inline float4 scaled_sum(float4 a, float factor, float4 b) {
    return scaled_sum(a, float4{factor, factor, factor, factor}, b);
}

// Where piece `piece` of 16 bytes of a row of a box lies in it.
__device__ inline uint32_t side_offset(uint32_t row, uint32_t piece) { return row * kSideRowBytes + (piece ^ row % 8) * 16; }

// Where a row starts. Neither number is negative, which saves a register each.
__device__ inline size_t start_of(int row, int width) {
    return static_cast<size_t>(static_cast<uint32_t>(row)) * static_cast<uint32_t>(width);
}

// Whole lines of the stream, where no tile of 112 columns cuts them: eight threads a row, two rows each, eight columns of each.
//
// Squares are summed by 32 columns in one order, whatever the tile: else a row's sum, and all that becomes of it, would depend
// in its last bits on the tile, and so on the number of rows. But where tiles of 112 columns are allowed, every seventh of
// these, which two of them share, is summed by 16 columns, again whatever the tile. The second sum goes behind all others.
struct AddToStream {
    static constexpr int kChunk = 64, kPassRows = 8;
    bf16 *scaled;
    uint16_t *rest;
    float *squares;
    const bf16 *scaled_by, *norm, *bias;
    int slots, n, rows = 0;
    static constexpr bool kMayShareSlots = true;
    // Whether there is room for that, and the width is one of tiles of 112.
    __host__ __device__ bool shares_slots() const { return n % 224 == 0 && n / 28 <= slots; }
    struct OfTile {
        float4 weights[2], back[2];  // of the thread's columns of a chunk, for both its passes
    };
    template <int kColumns>
    struct Loaded {
        OfColumns<kColumns> scaled_by, norm;
    };
    __device__ void start(const Schedule &schedule) { rows = schedule.rows; }
    __device__ OfTile load_tile(int) const { return {}; }
    // A bias, which few layers have, is added before the passes: there it would cost them something where there is none.
    template <int kColumns>
    __device__ void prepare(float (&c)[kColumns / 2], int tile_column) const {
        if (!bias) return;
#pragma unroll
        for (int group = 0; group < kColumns / 8; ++group) {
            const int column = min(tile_column + group * 8 + static_cast<int>(threadIdx.x) % 4 * 2, n - 2);
            const float2 of_bias = unpack_by_shifts(__ldg(reinterpret_cast<const uint32_t *>(bias + column)));
            c[group * 4] += of_bias.x, c[group * 4 + 1] += of_bias.y;
            c[group * 4 + 2] += of_bias.x, c[group * 4 + 3] += of_bias.y;
        }
    }
    template <int kColumns>
    __device__ Loaded<kColumns> load(int tile_column) const {
        return {OfColumns<kColumns>{scaled_by, tile_column, n}.of_stream(),
                OfColumns<kColumns>{norm, tile_column, n}.of_stream()};
    }
    template <class T, class BoxAt>
    __device__ void finish(uint32_t staged, const BoxAt &box_at, int row, int tile_column, int chunk, int half, int begin,
                           int end, OfTile &of_tile, const Loaded<T::n> &loaded) const {
        const uint32_t lane = threadIdx.x % 32, part = lane % 8, first_row = lane / 8;
        const int column = tile_column + chunk * kChunk + static_cast<int>(part) * 8;
        if (half == 0) {
            uint32_t weights[4], back[4];
            loaded.norm.words_at(weights, chunk, part * 8);
            loaded.scaled_by.words_at(back, chunk, part * 8);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                of_tile.weights[i] = unpack_four(weights[i * 2], weights[i * 2 + 1]);
                const float4 by = unpack_four(back[i * 2], back[i * 2 + 1]);
                of_tile.back[i] = {reciprocal(by.x), reciprocal(by.y), reciprocal(by.z), reciprocal(by.w)};
            }
        }
        // The thread's rows are four apart, for which in a box another bit of a piece's place changes, and its two pieces of
        // sums lie beside each other or, swapped, the other way round.
        static_assert(kPitchBytes<AddToStream> % 32 == 0);
        const uint32_t in_box = side_offset(half * kPassRows + first_row, part);
        const uint32_t upper_at = box_at(chunk * 2) + in_box, lower_at = box_at(chunk * 2 + 1) + in_box;
        const uint32_t low_at = staged + first_row * kPitchBytes<AddToStream> + swapped(part * 2) * 16, high_at = low_at ^ 16;
        const int row_0 = row + half * kPassRows + static_cast<int>(first_row);
        const size_t to_0 = start_of(row_0, n) + column;
        const bool inside = (kMostBefore<T, AddToStream> == 0 || column >= begin) && column < end;
        float squares_of[2] = {};
        if (inside)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint32_t further = i * 4 * kSideRowBytes, flipped = i * 64;
                const uint4 upper = load_words((upper_at ^ flipped) + further);
                const uint4 lower = load_words((lower_at ^ flipped) + further);
                float4 low = load_shared(low_at + i * 4 * kPitchBytes<AddToStream>);
                float4 high = load_shared(high_at + i * 4 * kPitchBytes<AddToStream>);
                low = scaled_sum(join_four(upper.x, upper.y, lower.x, lower.y), of_tile.back[0], low);
                high = scaled_sum(join_four(upper.z, upper.w, lower.z, lower.w), of_tile.back[1], high);
                squares_of[i] = square(low) + square(high);
                if (row_0 + i * 4 < rows) {
                    const float4 &by_low = of_tile.weights[0], &by_high = of_tile.weights[1];
                    uint4 to_scaled, to_rest;
                    split_pair(low.x * by_low.x, low.y * by_low.y, to_scaled.x, to_rest.x);
                    split_pair(low.z * by_low.z, low.w * by_low.w, to_scaled.y, to_rest.y);
                    split_pair(high.x * by_high.x, high.y * by_high.y, to_scaled.z, to_rest.z);
                    split_pair(high.z * by_high.z, high.w * by_high.w, to_scaled.w, to_rest.w);
                    const size_t to = to_0 + static_cast<uint32_t>(i * 4 * n);
                    *reinterpret_cast<uint4 *>(scaled + to) = to_scaled;
                    *reinterpret_cast<uint4 *>(rest + to) = to_rest;
                }
            }
        static_assert(kSlotColumns == 32, "four threads have a slot's columns");
        const int square_row = row_0 + static_cast<int>(part % 2) * 4;
        const uint32_t slot = static_cast<uint32_t>(column) / kSlotColumns;
        const bool second = part & 2, shared = shares_slots() && slot % 7 == 3;
        const float of_pair = sum_of_pair(squares_of), of_quad = of_pair + __shfl_xor_sync(0xffffffffu, of_pair, 2);
        if ((shared || !second) && inside && square_row < rows)
            squares[start_of(square_row, slots) + (second ? n / kSlotColumns + slot / 7 : slot)] = shared ? of_pair : of_quad;
    }
    static constexpr bool kPairPerChunk = true;
    template <class T>
    __device__ int boxes() const {
        return divide_up(T::n, kChunk) * 2;
    }
    __device__ int side_matrix(int box) const { return box % 2; }
    __device__ int side_row(int row) const { return row; }
    __device__ int side_column(int tile_column, int box) const { return tile_column + box / 2 * kChunk; }
};

// Heads in the columns below rope_columns are rotated by angles that come as cosines and sines by turns, [positions,
// head_dim]. Four threads a row, two rows each, eight apart; of them a thread has four columns, and the four that lie eight
// further. Passes as of AddToStream were slower here.
struct RotateHeads {
    static constexpr int kChunk = 32, kPassRows = 16;
    bf16 *out;
    const bf16 *bias;
    RowNorm norm;
    GleanerStarts starts;
    int head_dim, rope_columns, n, rows = 0, row_start = 0, position_start = 0, out_start = 0;
    static constexpr bool kMayShareSlots = false;
    struct OfTile {
        float factors[2];
    };
    template <int kColumns>
    using Loaded = OfColumns<kColumns>;
    __device__ void start(const Schedule &schedule) {
        rows = schedule.rows, row_start = schedule.row_start;
        position_start = start_of_rows(starts.position), out_start = start_of_rows(starts.out);
    }
    __device__ static int row_of(int i) { return threadIdx.x % 32 / 4 + i * 8; }
    __device__ OfTile load_tile(int row) const {
        OfTile of_tile;
        norm.factors<4>(of_tile.factors,
                     {row_start + min(row + row_of(0), rows - 1), row_start + min(row + row_of(1), rows - 1)});
        return of_tile;
    }
    template <int kColumns>
    __device__ void prepare(float (&)[kColumns / 2], int) const {}
    template <int kColumns>
    __device__ Loaded<kColumns> load(int tile_column) const {
        return {bias, tile_column, n};
    }
    template <class T, class BoxAt>
    __device__ void finish(uint32_t staged, const BoxAt &box_at, int row, int tile_column, int chunk, int, int, int end,
                           OfTile &of_tile, const Loaded<T::n> &of_bias) const {
        const int quad = static_cast<int>(threadIdx.x) % 4, in_chunk = quad / 2 * 16 + quad % 2 * 4;
        const int in_tile = chunk * kChunk + in_chunk, column = tile_column + in_tile;
        const int group_column = tile_column + chunk * kChunk + quad * 8;
        uint32_t low_words[2], high_words[2];
        of_bias.words_at(low_words, chunk / 2, chunk % 2 * kChunk + in_chunk);
        of_bias.words_at(high_words, chunk / 2, chunk % 2 * kChunk + in_chunk + 8);
        const float4 bias_low = unpack_four(low_words[0], low_words[1]), bias_high = unpack_four(high_words[0], high_words[1]);
        // All heads are rotated by the same angles: a box for each chunk of a head will do.
        const uint32_t box = box_at((tile_column / kChunk + chunk) & (head_dim / kChunk - 1));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t sums = staged + row_of(i) * kPitchBytes<RotateHeads> + in_chunk * 4;
            const float4 low = scaled_sum(load_shared(sums), of_tile.factors[i], bias_low),
                         high = scaled_sum(load_shared(sums + 32), of_tile.factors[i], bias_high);
            float4 a = load_shared(box + side_offset(row_of(i), quad * 2)),
                   b = load_shared(box + side_offset(row_of(i), quad * 2 + 1));
            if (column >= rope_columns) a = b = {1.f, 0.f, 1.f, 0.f};
            const uint4 group = exchange(pack_four({low.x * a.x - high.x * a.y, low.y * a.z - high.y * a.w,
                                                    low.z * b.x - high.z * b.y, low.w * b.z - high.w * b.w}),
                                         pack_four({high.x * a.x + low.x * a.y, high.y * a.z + low.y * a.w,
                                                    high.z * b.x + low.z * b.y, high.w * b.z + low.w * b.w}));
            if (row + row_of(i) < rows && group_column < end)
                *reinterpret_cast<uint4 *>(out + start_of(out_start + row + row_of(i), n) + group_column) = group;
        }
    }
    static constexpr bool kPairPerChunk = false;
    template <class T>
    __device__ int boxes() const {
        return head_dim / kChunk;
    }
    __device__ int side_matrix(int) const { return 0; }
    __device__ int side_row(int row) const { return position_start + row; }
    __device__ int side_column(int, int box) const { return box * kChunk; }
};
