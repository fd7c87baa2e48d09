// The residual stream of one row while three kernels a layer take it through a model, and what they share.
#pragma once

#include "hopper.cuh"

// Of what is added to a row by more than a hundred CTAs at once, so many sums: those that add to one place wait for each other.
// The length of a row in kernels.h counts them.
constexpr int kAddedSums = 2;

// As kernels.h describes it.
struct FixedRow {
    long long *x, *added;  // [width], [kAddedSums, width]
    int *broken;
};

inline FixedRow fixed_row(const int64_t *row, int32_t width) {
    auto *x = const_cast<long long *>(reinterpret_cast<const long long *>(row));
    return {x, x + width, reinterpret_cast<int *>(x + (1 + kAddedSums) * width)};
}

constexpr float kFixedOne = 1ull << 32;
constexpr float kMostAdded = 1 << 21, kMost = 1 << 30;

__device__ inline long long to_fixed(float value, int *broken) {
    // Not a number is not below it either.
    if (fabsf(value) < kMostAdded) return __float2ll_rn(value * kFixedOne);
    *broken = 1;
    return 0;
}

// Whether the row is broken is asked at its end alone: asked by each warp that reads the row, it is one place that a thousand
// of them wait for.
__device__ inline float from_fixed(long long value, bool broken = false) {
    const float x = __ll2float_rn(value) * (1.f / kFixedOne);
    return !broken && fabsf(x) < kMost ? x : __int_as_float(0x7fc00000);
}

__device__ inline void add(long long *to, long long value) {
    atomicAdd(reinterpret_cast<unsigned long long *>(to), static_cast<unsigned long long>(value));
}

// Brings a row, of which a thread has two columns, where products find it, times the norm's weights: as the sum of two bf16
// numbers, which hold 16 bits. A warp sees its own 64 columns at once.
__device__ inline void split_row(uint32_t *high, uint32_t *low, float2 x, float2 norm) {
    const float2 normed = {x.x * norm.x, x.y * norm.y};
    const uint32_t rounded = pack(normed.x, normed.y);
    const float2 back = unpack(rounded);
    high[threadIdx.x] = rounded;
    low[threadIdx.x] = pack(normed.x - back.x, normed.y - back.y);
    __syncwarp();
}

// The squares of a warp's columns of the row. Summed when the products are under way, which do not need them.
__device__ inline void sum_squares(float *squares, float2 x) {
    float sum = x.x * x.x + x.y * x.y;
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
}

// Launches a kernel that lies beside others of these on a multiprocessor, for which all must want its memory divided alike.
template <class Args>
int32_t launch_row(void (*kernel)(Args), dim3 grid, int threads, int shared_bytes, void *stream, const Args &args) {
    cudaError_t status =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
    if (status == cudaSuccess)
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    return status == cudaSuccess ? launch_overlapping(kernel, grid, threads, shared_bytes, stream, args) : status;
}
