// What becomes of the results of a linear layer. A product has groups of 16 columns, of which a lane holds, for a row,
// the columns pair, pair + 1 (low) and pair + 8, pair + 9 (high); `pair` is 0, 2, 4 or 6, `group` the group's first column.
//
// What an epilogue needs of the row's old values it loads before, so that a kernel can ask for them long before the
// product is there. It makes words of two values, which kernels store alone, or four lanes' together.
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
    __device__ Loaded load(int row, int group, int pair) const {
        const auto *at = reinterpret_cast<const uint32_t *>(out + static_cast<size_t>(row) * out_stride + group + pair);
        return {at[0], at[4]};
    }
    using Row = Nothing;
    __device__ Nothing row(int) const { return {}; }
    __device__ void apply(uint32_t (&words)[2], Nothing, int, int, float2 low, float2 high, Loaded old) const {
        const float2 old_low = unpack(old.low), old_high = unpack(old.high);
        words[0] = pack(old_low.x + low.x, old_low.y + low.y);
        words[1] = pack(old_high.x + high.x, old_high.y + high.y);
    }
};

// Columns come as 8 of the gate, 8 of the up projection, and so on: silu(gate) * up leaves half of them.
struct SwiGlu {
    bf16 *out;
    int out_stride;
    static constexpr int kWords = 1;
    using Loaded = Nothing;
    __device__ Nothing load(int, int, int) const { return {}; }
    using Row = Nothing;
    __device__ Nothing row(int) const { return {}; }
    __device__ void apply(uint32_t (&words)[1], Nothing, int, int, float2 gate, float2 up, Nothing) const {
        // The fast division is off by two units of 2^-24 at most, and right at both ends.
        words[0] = pack(__fdividef(gate.x, 1.f + __expf(-gate.x)) * up.x, __fdividef(gate.y, 1.f + __expf(-gate.y)) * up.y);
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
    using Loaded = Nothing;
    __device__ Nothing load(int, int, int) const { return {}; }
    using Row = const float2 *;
    // The angles of a row.
    __device__ const float2 *row(int row) const {
        return table + static_cast<size_t>(row + (row_start ? *row_start : 0)) * (head_dim / 2);
    }
    __device__ void apply(uint32_t (&words)[2], const float2 *row, int group, int pair, float2 low, float2 high,
                          Nothing) const {
        float4 angles{1.f, 0.f, 1.f, 0.f};
        // Read as constants: else each load would wait for the stores before it.
        if (group < rope_columns)
            angles = __ldg(reinterpret_cast<const float4 *>(row + (group & (head_dim - 1)) / 2 + pair));
        words[0] = pack(low.x * angles.x - high.x * angles.y, low.y * angles.z - high.y * angles.w);
        words[1] = pack(high.x * angles.x + low.x * angles.y, high.y * angles.z + low.y * angles.w);
    }
};

// A lane's part of a group of the bias, which may be null: low in x and y, high in z and w.
__device__ inline float4 load_bias(const bf16 *bias, int group, int pair) {
    if (!bias) return {};
    const float2 low = unpack(__ldg(reinterpret_cast<const uint32_t *>(bias + group + pair)));
    const float2 high = unpack(__ldg(reinterpret_cast<const uint32_t *>(bias + group + pair + 8)));
    return {low.x, low.y, high.x, high.y};
}

// Stores one lane's words of a group.
template <class Epilogue>
__device__ void store(const Epilogue &epilogue, int row, int group, int pair,
                      const uint32_t (&words)[Epilogue::kWords]) {
    auto *out = reinterpret_cast<uint32_t *>(epilogue.out + static_cast<size_t>(row) * epilogue.out_stride +
                                             group * Epilogue::kWords / 2 + pair);
    out[0] = words[0];
    if constexpr (Epilogue::kWords == 2) out[4] = words[1];
}
