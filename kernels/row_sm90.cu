// The residual stream of one row from fp32 to fixed point and back.
#include "kernels.h"
#include "row_sm90.cuh"

namespace {

constexpr int kThreads = 512;

struct Args {
    FixedRow row;
    float *x;
    int width;
};

__global__ void __launch_bounds__(kThreads) row_start_kernel(const Args args) {
    wait_for_previous();
    // Only now, for the kernel after the next one reads early what came before this one.
    start_next();
    if (threadIdx.x == 0) *args.row.broken = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < args.width; i += kThreads) {
        args.row.x[i] = to_fixed(args.x[i], args.row.broken);
#pragma unroll
        for (int sum = 0; sum < kAddedSums; ++sum) args.row.added[sum * args.width + i] = 0;
    }
}

__global__ void __launch_bounds__(kThreads) row_end_kernel(const Args args) {
    start_next();
    wait_for_previous();
    const bool broken = __ldcg(args.row.broken);
    for (int i = threadIdx.x; i < args.width; i += kThreads) {
        long long x = __ldcg(args.row.x + i);
#pragma unroll
        for (int sum = 0; sum < kAddedSums; ++sum) x += __ldcg(args.row.added + sum * args.width + i);
        args.x[i] = from_fixed(x, broken);
    }
}

}  // namespace

extern "C" int32_t gleaner_row_sm90_start(int64_t *row, const float *x, int32_t width, void *stream) {
    return launch_row(row_start_kernel, 1, kThreads, 0, stream, Args{fixed_row(row, width), const_cast<float *>(x), width});
}

extern "C" int32_t gleaner_row_sm90_end(float *x, const int64_t *row, int32_t width, void *stream) {
    return launch_row(row_end_kernel, 1, kThreads, 0, stream, Args{fixed_row(row, width), x, width});
}
