// What becomes of the results of a linear layer. An epilogue gets, of one row, the columns column, column + 1 (low) and
// column + 8, column + 9 (high); column is even, and column / 8 is. What else it needs it loads before, so that a kernel can
// ask for it long before the product is there. It returns what is to be stored as words of two values; kernels store them
// alone, or four lanes' together. Residual has more to store, in steps of its own.
#pragma once

#include "common.cuh"
#include "kernels.h"
#include "stream.cuh"

struct Nothing {};

// What is left of the norm of the rows that a product is made of, which come multiplied with its weights: a factor for
// each row, which the row of the product takes as well.
struct RowNorm {
    const float *squares;  // [*, slots]: their sum over a row is that of the squares of the row before the norm
    int slots;
    float width, eps;

    // Computes those of so many rows, which the four lanes of a quad ask for together: kAtOnce groups of 16 slots of all rows at
    // once, for one after another, each would take the latency of memory. Four need registers that are free before a product alone; with
    // one, two rounds of the loop may still be joined.
    template <int kAtOnce, int kRows>
    __device__ void factors(float (&of)[kRows], const int (&rows)[kRows]) const {
        const float4 *at[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            at[i] = reinterpret_cast<const float4 *>(squares + static_cast<size_t>(rows[i]) * slots) + threadIdx.x % 4;
            of[i] = 0.f;
        }
        const int groups = slots / 16;
#pragma unroll kAtOnce == 1 ? 2 : 1
        for (int first = 0; first < groups; first += kAtOnce) {
            float4 parts[kAtOnce][kRows];
#pragma unroll
            for (int group = 0; group < kAtOnce; ++group)
#pragma unroll
                for (int i = 0; i < kRows; ++i)
                    parts[group][i] = first + group < groups ? __ldcg(at[i] + (first + group) * 4) : float4{};
#pragma unroll
            for (int group = 0; group < kAtOnce; ++group)
#pragma unroll
                for (int i = 0; i < kRows; ++i) {
                    const float4 &part = parts[group][i];
                    of[i] += part.x + part.y + (part.z + part.w);
                }
        }
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            of[i] += __shfl_xor_sync(0xffffffffu, of[i], 1);
            of[i] += __shfl_xor_sync(0xffffffffu, of[i], 2);
            of[i] = rsqrtf(of[i] / width + eps);
        }
    }
};

inline RowNorm row_norm(const float *squares, int32_t width, float eps) {
    return {squares, GLEANER_SQUARES(width), static_cast<float>(width), eps};
}

// Of x, whose squares are summed together: here in one slot, on Hopper of some in two.
constexpr int kSlotColumns = GLEANER_SQUARES_COLUMNS / GLEANER_SQUARES_SLOTS;

// Adds to the residual stream, as stream.cuh has it: what comes out is scaled with the weights of another norm.
struct Residual {
    bf16 *out;  // scaled
    uint16_t *rest;
    float *squares;                // as in RowNorm
    const bf16 *scaled_by, *norm;  // [out_stride]: the weights before, and from now on
    int out_stride, slots;
    static constexpr int kWords = 2;
    struct Sums {
        float2 low, high;
    };
    struct Loaded {
        uint32_t scaled[2], rest[2];
    };
    template <class T>
    __device__ uint32_t *at(T *half, int row, int column) const {
        return reinterpret_cast<uint32_t *>(half + static_cast<size_t>(row) * out_stride + column);
    }
    __device__ static float2 weights(const bf16 *of, int column) {
        return unpack(stream_weights(__ldg(reinterpret_cast<const uint32_t *>(of + column))));
    }
    __device__ Loaded load(int row, int column) const {
        const uint32_t *scaled = at(out, row, column), *lower = at(rest, row, column);
        return {{scaled[0], scaled[4]}, {lower[0], lower[4]}};
    }
    __device__ float2 add(const float (&sums)[2], uint32_t scaled, uint32_t lower, int column) const {
        const float2 old = join_pair(scaled, lower), by = weights(scaled_by, column);
        return {old.x * reciprocal(by.x) + sums[0], old.y * reciprocal(by.y) + sums[1]};
    }
    __device__ Sums add(const float (&low)[2], const float (&high)[2], const Loaded &old, int column) const {
        return {add(low, old.scaled[0], old.rest[0], column), add(high, old.scaled[1], old.rest[1], column + 8)};
    }
    __device__ static float square(const Sums &sum) {
        return sum.low.x * sum.low.x + sum.low.y * sum.low.y + (sum.high.x * sum.high.x + sum.high.y * sum.high.y);
    }
    // Stores the rest; `words` are those of what is scaled.
    __device__ void apply(uint32_t (&words)[2], int row, int column, const Sums &sum) const {
        const float2 low = weights(norm, column), high = weights(norm, column + 8);
        uint32_t *lower = at(rest, row, column);
        split_pair(sum.low.x * low.x, sum.low.y * low.y, words[0], lower[0]);
        split_pair(sum.high.x * high.x, sum.high.y * high.y, words[1], lower[4]);
    }
    // Stores the sum of the squares of kSlotColumns columns of a row, of which each lane of a quad brings a part.
    __device__ void store_square(int row, int first_column, float part, bool alive) const {
        part += __shfl_xor_sync(0xffffffffu, part, 1);
        part += __shfl_xor_sync(0xffffffffu, part, 2);
        if (alive && threadIdx.x % 4 == 0 && first_column / kSlotColumns < slots)
            squares[static_cast<size_t>(row) * slots + first_column / kSlotColumns] = part;
    }
};

// Off by a few units of 2^-24, and right at both ends.
__device__ inline float silu(float x) {
    return x * reciprocal(1.f + exp2_fast(x * -1.44269504f));
}

// Columns come as 8 of the gate, 8 of the up projection, and so on: silu(gate) * up leaves half of them.
struct SwiGlu {
    bf16 *out;
    int out_stride;
    static constexpr int kWords = 1;
    using Loaded = Nothing;
    __device__ Nothing load(int, int) const { return {}; }
    __device__ void apply(uint32_t (&words)[1], int, const float (&gate)[2], const float (&up)[2], Nothing) const {
        words[0] = pack(silu(gate[0]) * up[0], silu(gate[1]) * up[1]);
    }
};

// The columns below rope_columns are heads whose dimensions come as 8 of the lower half, 8 of the upper, and so on:
// each pair is rotated by the row's position and stays where it is. head_dim is a power of two.
struct Rope {
    bf16 *out;
    const float2 *table;  // cosine and sine, [positions, head_dim / 2]
    const int32_t *position_start;
    int out_stride, head_dim, rope_columns;
    static constexpr int kWords = 2;
    // The cosines and sines of two pairs: the same for a column of every head.
    using Loaded = float4;
    __device__ float4 load(int row, int column) const {
        if (rope_columns == 0) return {};
        const int in_head = column & (head_dim - 1);
        const int pair = in_head / 16 * 8 + in_head % 8;
        const int position = row + start_of_rows(position_start);
        // Read as constants: else each load would wait for the stores before it.
        return __ldg(reinterpret_cast<const float4 *>(table + static_cast<size_t>(position) * (head_dim / 2) + pair));
    }
    __device__ void apply(uint32_t (&words)[2], int column, const float (&low)[2], const float (&high)[2],
                          float4 angles) const {
        if (column >= rope_columns) angles = {1.f, 0.f, 1.f, 0.f};
        words[0] = pack(low[0] * angles.x - high[0] * angles.y, low[1] * angles.z - high[1] * angles.w);
        words[1] = pack(high[0] * angles.x + low[0] * angles.y, high[1] * angles.z + low[1] * angles.w);
    }
};

// Stores one lane's words of the columns column and column + 8 of the product.
template <class Epilogue>
__device__ void store(const Epilogue &epilogue, int row, int column, const uint32_t (&words)[Epilogue::kWords]) {
    const int at = Epilogue::kWords == 2 ? column : column / 16 * 8 + column % 8;
    auto *out = reinterpret_cast<uint32_t *>(epilogue.out + static_cast<size_t>(row) * epilogue.out_stride + at);
    out[0] = words[0];
    if constexpr (Epilogue::kWords == 2) out[4] = words[1];
}
