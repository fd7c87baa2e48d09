// What becomes of the results of a linear layer. An epilogue gets, of one row, the columns column, column + 1 (low) and
// column + 8, column + 9 (high); column is even, and column / 8 is.
#pragma once

#include "common.cuh"

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
    __device__ void operator()(int row, int column, const float (&low)[2], const float (&high)[2]) const {
        add(row, column, low);
        add(row, column + 8, high);
    }
    __device__ void add(int row, int column, const float (&v)[2]) const {
        auto *at = reinterpret_cast<uint32_t *>(x + static_cast<size_t>(row) * n + column);
        const float2 old = unpack(*at);
        *at = pack(old.x + v[0], old.y + v[1]);
    }
};

// Columns come as 8 of the gate, 8 of the up projection, and so on: silu(gate) * up leaves half of them.
struct SwiGlu {
    bf16 *out;
    int out_stride;
    __device__ void operator()(int row, int column, const float (&gate)[2], const float (&up)[2]) const {
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
    __device__ void operator()(int row, int column, const float (&low)[2], const float (&high)[2]) const {
        const Store store{out, out_stride};
        if (column >= rope_columns) return store(row, column, low, high);
        const int in_head = column % head_dim;
        const int pair = in_head / 16 * 8 + in_head % 8;
        const int position = row + (row_start ? *row_start : 0);
        const float2 *at = table + static_cast<size_t>(position) * (head_dim / 2) + pair;
        float rotated_low[2], rotated_high[2];
        for (int i = 0; i < 2; ++i) {
            const float2 angle = at[i];
            rotated_low[i] = low[i] * angle.x - high[i] * angle.y;
            rotated_high[i] = high[i] * angle.x + low[i] * angle.y;
        }
        store(row, column, rotated_low, rotated_high);
    }
};
