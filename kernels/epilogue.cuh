// What becomes of the results of a linear layer. An epilogue gets, of one row, the columns column, column + 1 (low) and
// column + 8, column + 9 (high); column is even, and column / 8 is. What it needs of the row's old values it loads before,
// so that a kernel can ask for them long before the product is there.
#pragma once

#include "common.cuh"

struct Nothing {};

// Writes what a lane holds of two neighbouring columns.
struct Store {
    bf16 *out;
    int out_stride;
    __device__ void operator()(int row, int column, const float (&low)[2], const float (&high)[2]) const {
        write(row, column, low);
        write(row, column + 8, high);
    }
    __device__ void write(int row, int column, const float (&v)[2]) const {
        *reinterpret_cast<uint32_t *>(out + static_cast<size_t>(row) * out_stride + column) = pack(v[0], v[1]);
    }
};

// Adds to what stands there: one rounding for product and sum.
struct Residual {
    bf16 *x;
    int n;
    struct Loaded {
        uint32_t low, high;
    };
    __device__ uint32_t *at(int row, int column) const {
        return reinterpret_cast<uint32_t *>(x + static_cast<size_t>(row) * n + column);
    }
    __device__ Loaded load(int row, int column) const { return {*at(row, column), *at(row, column + 8)}; }
    __device__ void operator()(int row, int column, const float (&low)[2], const float (&high)[2], Loaded old) const {
        const float2 old_low = unpack(old.low), old_high = unpack(old.high);
        *at(row, column) = pack(old_low.x + low[0], old_low.y + low[1]);
        *at(row, column + 8) = pack(old_high.x + high[0], old_high.y + high[1]);
    }
};

// Columns come as 8 of the gate, 8 of the up projection, and so on: silu(gate) * up leaves half of them.
struct SwiGlu {
    bf16 *out;
    int out_stride;
    using Loaded = Nothing;
    __device__ Nothing load(int, int) const { return {}; }
    __device__ void operator()(int row, int column, const float (&gate)[2], const float (&up)[2], Nothing) const {
        const float h0 = gate[0] / (1.f + __expf(-gate[0])) * up[0];
        const float h1 = gate[1] / (1.f + __expf(-gate[1])) * up[1];
        const int half = column / 16 * 8 + column % 8;
        *reinterpret_cast<uint32_t *>(out + static_cast<size_t>(row) * out_stride + half) = pack(h0, h1);
    }
};

// The columns below rope_columns are heads whose dimensions come as 8 of the lower half, 8 of the upper, and so on:
// each pair is rotated by the row's position and stays where it is.
struct Rope {
    bf16 *out;
    const float2 *table;  // cosine and sine, [positions, head_dim / 2]
    const int32_t *row_start;
    int out_stride, head_dim, rope_columns;
    using Loaded = Nothing;
    __device__ Nothing load(int, int) const { return {}; }
    __device__ void operator()(int row, int column, const float (&low)[2], const float (&high)[2], Nothing) const {
        const Store store{out, out_stride};
        if (column >= rope_columns) return store(row, column, low, high);
        const int in_head = column % head_dim;
        const int pair = in_head / 16 * 8 + in_head % 8;
        const int position = row + (row_start ? *row_start : 0);
        // Read as constants: else each load would wait for the stores before it.
        const float4 angles =
            __ldg(reinterpret_cast<const float4 *>(table + static_cast<size_t>(position) * (head_dim / 2) + pair));
        const float rotated_low[2] = {low[0] * angles.x - high[0] * angles.y, low[1] * angles.z - high[1] * angles.w};
        const float rotated_high[2] = {high[0] * angles.x + low[0] * angles.y, high[1] * angles.z + low[1] * angles.w};
        store(row, column, rotated_low, rotated_high);
    }
};
