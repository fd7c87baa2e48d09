// What becomes of the results of a linear layer. A product has groups of 16 columns, of which a lane holds, for a row,
// the columns pair, pair + 1 (low) and pair + 8, pair + 9 (high); `pair` is 0, 2, 4 or 6, `group` the group's first column.
//
// An epilogue says what a sum starts from, and makes of the sum words of two values that kernels store alone, or four
// lanes' together.
#pragma once

#include "common.cuh"

struct Nothing {};

// Adds to what stands there: one rounding for product and sum.
struct Residual {
    bf16 *out;
    int out_stride;
    static constexpr int kWords = 2;
    using Row = Nothing;
    __device__ Nothing row(int) const { return {}; }
    __device__ float4 initial(int row, int group, int pair) const {
        const auto *at = reinterpret_cast<const uint32_t *>(out + static_cast<size_t>(row) * out_stride + group + pair);
        const float2 low = unpack(at[0]), high = unpack(at[4]);
        return {low.x, low.y, high.x, high.y};
    }
    __device__ void apply(uint32_t (&words)[2], Nothing, int, int, float2 low, float2 high) const {
        words[0] = pack(low.x, low.y);
        words[1] = pack(high.x, high.y);
    }
};

// Columns come as 8 of the gate, 8 of the up projection, and so on: silu(gate) * up leaves half of them.
struct SwiGlu {
    bf16 *out;
    int out_stride;
    static constexpr int kWords = 1;
    using Row = Nothing;
    __device__ Nothing row(int) const { return {}; }
    __device__ float4 initial(int, int, int) const { return {}; }
    __device__ void apply(uint32_t (&words)[1], Nothing, int, int, float2 gate, float2 up) const {
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
    using Row = const float2 *;
    // The angles of a row.
    __device__ const float2 *row(int row) const {
        return table + static_cast<size_t>(row + (row_start ? *row_start : 0)) * (head_dim / 2);
    }
    __device__ float4 initial(int, int, int) const { return {}; }
    __device__ void apply(uint32_t (&words)[2], const float2 *row, int group, int pair, float2 low, float2 high) const {
        float4 angles{1.f, 0.f, 1.f, 0.f};
        // Read as constants: else each load would wait for the stores before it.
        if (group < rope_columns)
            angles = __ldg(reinterpret_cast<const float4 *>(row + (group & (head_dim - 1)) / 2 + pair));
        words[0] = pack(low.x * angles.x - high.x * angles.y, low.y * angles.z - high.y * angles.w);
        words[1] = pack(high.x * angles.x + low.x * angles.y, high.y * angles.z + low.y * angles.w);
    }
};

// What the sums of a lane start from, with the bias, which may be null.
template <class Epilogue>
__device__ float4 start(const Epilogue &epilogue, const bf16 *bias, int row, int group, int pair) {
    float4 at = epilogue.initial(row, group, pair);
    if (bias) {
        const float2 low = unpack(__ldg(reinterpret_cast<const uint32_t *>(bias + group + pair)));
        const float2 high = unpack(__ldg(reinterpret_cast<const uint32_t *>(bias + group + pair + 8)));
        at = {at.x + low.x, at.y + low.y, at.z + high.x, at.w + high.y};
    }
    return at;
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
