// The MLP of one row. A CTA makes up to 40 columns of h, from their rows of gate and up, and multiplies them with their columns
// of down. All these weights fit its registers and shared memory, and are there before the row is: it starts while
// the kernels before it, which wait more than they load, are at work.
#include "epilogue.cuh"
#include "kernels.h"
#include "row_sm90.cuh"

namespace {

constexpr int kMaxWarps = 16;  // of 64 columns of the row
constexpr int kMaxGroups = 5;  // of eight columns of h
constexpr int kMaxRows = kMaxGroups * 16;
// More on its way than keeps the memory busy only delays what other kernels wait for: chunks of gate and up, of so many rows
// each, and pieces of down of 16 bytes, of each thread.
constexpr int kChunk = 8, kChunksAhead = 3, kPiecesAhead = 2;

struct Args {
    FixedRow row;
    const uint32_t *norm;
    const bf16 *gate_up;  // [2 * intermediate, width]
    const bf16 *gate_up_bias;
    const bf16 *down;     // [width, intermediate]
    const bf16 *down_bias;
    int width, intermediate;
    float eps;
};

struct Shared {
    uint32_t split[2][kMaxWarps * 32];
    bf16 h[kMaxGroups * 8];
    float parts[kMaxWarps][kMaxRows];
    float squares[kMaxWarps];
    uint64_t full[kMaxRows / kChunk];
};

__device__ void copy_bulk(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// c[16, 8] += a[16, 8] b[8, 8]
__device__ void mma_short(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(b));
}

// Rows of a matrix in shared memory, free of conflicts for products.
__host__ __device__ int pitch_of(int width) { return width * 2 + 16; }

// Each CTA but the last has kGroups of eight columns of h. So many registers a thread leave the other kernels room beside it, for
// rows of up to 896.
template <int kGroups>
__global__ void __maxnreg__(80) row_mlp_kernel(const Args args) {
    extern __shared__ __align__(128) uint8_t weights[];
    __shared__ Shared shared;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = args.width / 64, threads = warps * 32;
    const int first = blockIdx.x * kGroups, live = min(kGroups, args.intermediate / 8 - first);
    const int pitch = pitch_of(args.width);
    const uint32_t at = shared_address(weights);
    auto full = [&](int chunk) { return shared_address(shared.full + chunk); };

    start_next();
    if (threadIdx.x == 0) {
        for (int chunk = 0; chunk < kMaxRows / kChunk; ++chunk) barrier_init(full(chunk), 1);
        barrier_init_fence();
    }
    __syncthreads();
    // Five barriers of all threads: one above, and two each before and behind the wait.
    if (warp == warps) {
        __syncthreads();
        __syncthreads();
        for (int chunk = 0; chunk < live * 16 / kChunk; ++chunk) {
            if (chunk >= kChunksAhead) barrier_wait(full(chunk - kChunksAhead), 0);
            if (lane == 0) barrier_expect(full(chunk), kChunk * args.width * 2);
            __syncwarp();
            const int row = chunk * kChunk + lane;
            const bf16 *from = args.gate_up + static_cast<size_t>(first * 16 + row) * args.width;
            if (lane < kChunk) copy_bulk(at + row * pitch, from, args.width * 2, full(chunk));
        }
        __syncthreads();
        __syncthreads();
        return;
    }
    const float2 norm = unpack(args.norm[threadIdx.x]);
    // Down passes through the place of gate and up into registers. Of its rows a warp has 64; columns that are not there are 0.
    for (int i = threadIdx.x; i < args.width * kGroups; i += threads) {
        const int row = i / kGroups, piece = i % kGroups;
        const bf16 *from = args.down + static_cast<size_t>(row) * args.intermediate + (first + min(piece, live - 1)) * 8;
        copy_async(at + i * 16, from, piece < live);
        copy_commit();
        copy_wait<kPiecesAhead>();
    }
    copy_wait<0>();
    __syncthreads();
    uint32_t down[4][2][4], rest[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const uint32_t from = at + (warp * 64 + i * 16 + lane % 16) * kGroups * 16;
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            load_matrices(down[i][s], from + min(s * 2 + lane / 16, kGroups - 1) * 16);
            if (s * 2 >= kGroups) down[i][s][0] = down[i][s][1] = 0;
            if (s * 2 + 1 >= kGroups) down[i][s][2] = down[i][s][3] = 0;
        }
        load_matrices(rest[i], from + (kGroups - 1) * 16);
        if (kGroups < kMaxGroups) rest[i][0] = rest[i][1] = 0;
    }
    fence_for_engines();
    __syncthreads();

    wait_for_previous();
    const longlong2 fixed = __ldcg(reinterpret_cast<const longlong2 *>(args.row.x) + threadIdx.x);
    for (int chunk = 0; chunk < live * 16 / kChunk; ++chunk) barrier_wait(full(chunk), 0);
    const float2 x = {from_fixed(fixed.x), from_fixed(fixed.y)};
    split_row(shared.split[0], shared.split[1], x, norm);
    // Columns of the products by turns of the two parts.
    const uint32_t *split = shared.split[lane / 4 % 2] + warp * 32 + lane % 4;
    uint32_t b[4][2];
#pragma unroll
    for (int s = 0; s < 4; ++s) b[s][0] = split[s * 8], b[s][1] = split[s * 8 + 4];
    // Groups at once, as far as registers allow, for each alone would take the latency of its products. What comes of those that
    // the last CTA does not have is dropped.
    float c[kGroups][4] = {};
#pragma unroll
    for (int s = 0; s < 4; ++s)
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            uint32_t a[4];
            load_matrices(a, at + (i * 16 + lane % 16) * pitch + warp * 128 + s * 32 + lane / 16 * 16);
            mma(c[i], a, b[s][0], b[s][1]);
        }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
        float *part = shared.parts[warp] + i * 16 + lane / 4;
        if (lane % 4 == 0) part[0] = c[i][0] + c[i][1], part[8] = c[i][2] + c[i][3];
    }
    sum_squares(shared.squares, x);
    __syncthreads();
    if (warp < (kMaxRows + 31) / 32) {
        const int row = min(static_cast<int>(threadIdx.x), kMaxRows - 1);
        const bool alive = row < live * 16;
        float sum = 0.f, square = 0.f;
#pragma unroll
        for (int w = 0; w < kMaxWarps; ++w)
            if (w < warps) sum += shared.parts[w][row], square += shared.squares[w];
        sum *= rsqrtf(square / args.width + args.eps);
        if (args.gate_up_bias && alive) sum += __bfloat162float(args.gate_up_bias[first * 16 + row]);
        const float up = __shfl_down_sync(0xffffffffu, sum, 8);
        if (row % 16 < 8) shared.h[row / 16 * 8 + row % 8] = __float2bfloat16(alive ? silu(sum) * up : 0.f);
    }
    __syncthreads();
    const auto *h = reinterpret_cast<const uint32_t *>(shared.h) + lane % 4;
    // All columns of these products are alike; each lane of a quad keeps the sums of 16 rows.
    float own[2] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float sums[4] = {};
#pragma unroll
        for (int s = 0; s < 2; ++s) mma(sums, down[i][s], h[s * 8], h[s * 8 + 4]);
        mma_short(sums, rest[i][0], rest[i][1], h[16]);
        if (lane % 4 == i) own[0] = sums[0], own[1] = sums[2];
    }
    // Whole lines are added to at once: a lane gets the columns `lane` and 32 + `lane` of its warp's from where they are.
    long long *added = args.row.added + blockIdx.x % kAddedSums * args.width + warp * 64;
#pragma unroll
    for (int column = lane; column < 64; column += 32) {
        const int from = column % 8 * 4 + column / 16;
        const float low = __shfl_sync(0xffffffffu, own[0], from), high = __shfl_sync(0xffffffffu, own[1], from);
        float sum = column / 8 % 2 ? high : low;
        if (args.down_bias && blockIdx.x == 0) sum += __bfloat162float(args.down_bias[warp * 64 + column]);
        add(added + column, to_fixed(sum, args.row.broken));
    }
}

// Groups of columns of h for a CTA, so that all run at once.
int32_t count_groups(int *groups, int32_t intermediate) {
    int multiprocessors;
    const cudaError_t status = device_attribute(&multiprocessors, cudaDevAttrMultiProcessorCount);
    if (status == cudaSuccess) *groups = divide_up(intermediate / 8, multiprocessors);
    return status;
}

int shared_bytes(int width, int groups) { return groups * 16 * pitch_of(width); }

}  // namespace

extern "C" int32_t gleaner_row_sm90_fits(int32_t width, int32_t intermediate, int32_t head_dim) {
    int groups, bytes;
    // Three warps join the sums of all columns of h.
    return head_dim == 64 && width >= 256 && width % 128 == 0 && width <= kMaxWarps * 64 && intermediate > 0 &&
           intermediate % 8 == 0 &&
           count_groups(&groups, intermediate) == cudaSuccess && groups <= kMaxGroups &&
           device_attribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin) == cudaSuccess &&
           shared_bytes(width, groups) + static_cast<int>(sizeof(Shared)) <= bytes;
}

extern "C" int32_t gleaner_row_sm90_mlp(int64_t *row, const void *norm, const void *gate_up, const void *gate_up_bias,
                                        const void *down, const void *down_bias, float eps, int32_t width,
                                        int32_t intermediate, void *stream) {
    int groups;
    if (const int32_t status = count_groups(&groups, intermediate)) return status;
    const Args args{fixed_row(row, width),
                    static_cast<const uint32_t *>(norm),
                    static_cast<const bf16 *>(gate_up),
                    static_cast<const bf16 *>(gate_up_bias),
                    static_cast<const bf16 *>(down),
                    static_cast<const bf16 *>(down_bias),
                    width,
                    intermediate,
                    eps};
    constexpr decltype(&row_mlp_kernel<1>) kKernels[kMaxGroups] = {row_mlp_kernel<1>, row_mlp_kernel<2>, row_mlp_kernel<3>,
                                                                   row_mlp_kernel<4>, row_mlp_kernel<5>};
    return launch_row(kKernels[groups - 1], divide_up(intermediate / 8, groups), width / 2 + 32, shared_bytes(width, groups),
                      stream, args);
}
