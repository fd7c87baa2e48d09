// What becomes of the results of a linear layer. An epilogue gets, of one row, the columns column, column + 1 (low) and
// column + 8, column + 9 (high); column is even, and column / 8 is. What else it needs it loads before, so that a kernel can
// ask for it long before the product is there. It returns what is to be stored as words of two values; kernels store them
// alone, or four lanes' together.
#pragma once

#include "common.cuh"

struct Nothing {};

// Adds to what stands there: one rounding for product and sum.
struct Residual {
    bf16 *out;
    int out_stride;
    static constexpr int kWords = 2;
    struct Loaded {
        uint32_t low, high;
    };
    __device__ Loaded load(int row, int column) const {
        const auto *at = reinterpret_cast<const uint32_t *>(out + static_cast<size_t>(row) * out_stride + column);
        return {at[0], at[4]};
    }
    __device__ void apply(uint32_t (&words)[2], int, const float (&low)[2], const float (&high)[2], Loaded old) const {
        const float2 old_low = unpack(old.low), old_high = unpack(old.high);
        words[0] = pack(old_low.x + low[0], old_low.y + low[1]);
        words[1] = pack(old_high.x + high[0], old_high.y + high[1]);
    }
};

// Columns come as 8 of the gate, 8 of the up projection, and so on: silu(gate) * up leaves half of them.
struct SwiGlu {
    bf16 *out;
    int out_stride;
    static constexpr int kWords = 1;
    using Loaded = Nothing;
    __device__ Nothing load(int, int) const { return {}; }
    __device__ void apply(uint32_t (&words)[1], int, const float (&gate)[2], const float (&up)[2], Nothing) const {
        // The fast division is off by two units of 2^-24 at most, and right at both ends.
        const float h0 = __fdividef(gate[0], 1.f + __expf(-gate[0])) * up[0];
        const float h1 = __fdividef(gate[1], 1.f + __expf(-gate[1])) * up[1];
        words[0] = pack(h0, h1);
    }
};

// The columns below rope_columns are heads whose dimensions come as 8 of the lower half, 8 of the upper, and so on:
// each pair is rotated by the row's position and stays where it is. head_dim is a power of two.
struct Rope {
    bf16 *out;
    const float2 *table;  // cosine and sine, [positions, head_dim / 2]
    const int32_t *row_start;
    int out_stride, head_dim, rope_columns;
    static constexpr int kWords = 2;
    // The cosines and sines of two pairs: the same for a column of every head.
    using Loaded = float4;
    __device__ float4 load(int row, int column) const {
        if (rope_columns == 0) return {};
        const int in_head = column & (head_dim - 1);
        const int pair = in_head / 16 * 8 + in_head % 8;
        const int position = row + (row_start ? *row_start : 0);
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
