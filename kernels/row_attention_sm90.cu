// Attention of one new row over its cache, and what the output's matrix makes of it, added to the row.
//
// A cluster of eight CTAs serves 128 columns of query heads of one group: each takes every eighth tile of keys, then sends
// what it found to all others, and multiplies the whole with its eighth of the matrix's rows. Keys, values and the matrix are
// on their way before the row is there.
//
// Both products with keys and values run on the tensor cores with heads as rows, as in decode_attention.cu; what rounding
// leaves of the probabilities makes rows of its own.
#include <math.h>

#include "kernels.h"
#include "row_sm90.cuh"

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kSplits = 8;
constexpr int kColumns = 128;                // of what is attended to, for a cluster
constexpr int kPitch = kColumns * 2 + 16;    // bytes from row to row of the matrix in shared memory, free of conflicts
constexpr int kMaxRows = 1024 / kSplits;     // of the matrix

struct Args {
    FixedRow row;
    const bf16 *qkv;
    const uint4 *weight;  // [width, num_heads * head_dim]
    const bf16 *bias;
    const int32_t *position;
    int num_heads, num_kv_heads, window, width;
    float scale;
};

constexpr int kHeadDim = 64, kHeads = kColumns / kHeadDim;
constexpr int kTile = 128;                    // keys
constexpr int kPieces = kHeadDim / 8;         // of 16 bytes, of a row
constexpr int kSteps = kHeadDim / 16;         // of a product over the dimensions
constexpr int kKeyGroups = kTile / 8 / kWarps;  // of eight keys, of a warp; of dimensions it has eight
constexpr int kRegisters = 96;                // of a thread, so that the MLP's kernel has room beside it

struct Shared {
    uint4 values[2][kTile * kPieces];         // of this tile and the next, swizzled
    uint4 probabilities[2 * kHeads * kTile / 8];  // swizzled; rows of the heads, and of what rounding leaves of them
    float maxima[kWarps][kHeads], sums[kWarps][kHeads];
    float2 parts[kSplits][kColumns / 2];      // of all CTAs of the cluster: sums of values
    float2 statistics[kSplits][kHeads];       // maximum, sum
    uint64_t joined;
    bf16 attended[2][kColumns];               // rounded, and the rest
    float products[4][kMaxRows];
};

// Place of piece `piece` of a row of `pieces` of them.
__device__ int swizzled(int row, int piece, int pieces) { return row * pieces + (piece ^ row % 8); }

// The address that lies where this one does in the CTA of this rank.
__device__ uint32_t remote(uint32_t address, int rank) {
    uint32_t to;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(address), "r"(rank));
    return to;
}

// Stores a pair at the same place in all CTAs of the cluster, and tells their barriers.
__device__ void send(const float2 *at, float2 pair, uint32_t barrier) {
#pragma unroll
    for (int rank = 0; rank < kSplits; ++rank)
        asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.b32 [%0], {%1, %2}, [%3];" ::"r"(
                         remote(shared_address(at), rank)),
                     "r"(__float_as_uint(pair.x)), "r"(__float_as_uint(pair.y)), "r"(remote(barrier, rank))
                     : "memory");
}

__global__ void __cluster_dims__(kSplits, 1, 1) __maxnreg__(kRegisters) row_attention_kernel(const Args args) {
    extern __shared__ __align__(128) uint8_t matrix[];
    __shared__ __align__(1024) Shared shared;
    const int group = args.num_heads / args.num_kv_heads, split = blockIdx.x, kv_head = blockIdx.y;
    const int first_head = kv_head * group + blockIdx.z * kHeads;
    const int heads = min(kHeads, group - static_cast<int>(blockIdx.z) * kHeads);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const size_t stride = static_cast<size_t>(args.num_heads + 2 * args.num_kv_heads) * kHeadDim;
    const bf16 *k = args.qkv + (args.num_heads + kv_head) * kHeadDim, *v = k + args.num_kv_heads * kHeadDim;
    const uint32_t joined = shared_address(&shared.joined);

    start_next();
    if (threadIdx.x == 0) {
        barrier_init(joined, 1);
        barrier_init_fence();
    }
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
    const int position = __ldcg(args.position);
    const int oldest = args.window ? max(0, position + 1 - args.window) : 0;
    // The first tile of this CTA that holds a key.
    const int first_tile = split + max(0, oldest / kTile - split + kSplits - 1) / kSplits * kSplits;
    // As in decode_attention.cu: lane % 4 takes a quarter of the dimensions.
    const int quarter = lane % 4 * (kHeadDim / 4);
    uint32_t keys[kKeyGroups][kSteps * 2] = {}, q[kSteps * 2] = {};
    auto load_quarter = [&](uint32_t (&to)[kSteps * 2], const bf16 *row) {
#pragma unroll
        for (int i = 0; i < kHeadDim / 32; ++i) {
            const uint4 four = __ldcg(reinterpret_cast<const uint4 *>(row + quarter) + i);
            to[i * 4] = four.x, to[i * 4 + 1] = four.y, to[i * 4 + 2] = four.z, to[i * 4 + 3] = four.w;
        }
    };
    // The newest row is not there before the kernel before this one has ended.
    auto load_keys = [&](int tile, bool older, bool newest) {
#pragma unroll
        for (int n = 0; n < kKeyGroups; ++n) {
            const int key = tile * kTile + (warp * kKeyGroups + n) * 8 + lane / 4;
            if (key == position ? newest : older && key < position) load_quarter(keys[n], k + key * stride);
        }
    };
    // Rows behind the newest may hold anything, and 0 times infinity would not be 0.
    auto load_values = [&](int tile, bool older, bool newest) {
        uint4 *to = shared.values[tile / kSplits % 2];
#pragma unroll
        for (int i = 0; i < kTile * kPieces / kThreads; ++i) {
            const int in_tile = (threadIdx.x + i * kThreads) / kPieces, piece = threadIdx.x % kPieces;
            const int row = tile * kTile + in_tile;
            if (row == position ? newest : older)
                copy_async(shared_address(to + swizzled(in_tile, piece, kPieces)),
                           v + min(row, position) * stride + piece * 8, row <= position);
        }
    };
    load_keys(first_tile, true, false);
    load_values(first_tile, true, false);
    const int rows = args.width / kSplits;
    {
        const int vectors = args.num_heads * kPieces, row = threadIdx.x / 16, piece = threadIdx.x % 16;
        const bool live = piece < heads * kPieces;
        const uint4 *from = args.weight + static_cast<size_t>(split * rows + row) * vectors + first_head * kPieces;
        for (int i = 0; i < rows; i += kThreads / 16)
            copy_async(shared_address(matrix) + (i + row) * kPitch + piece * 16, from + i * vectors + (live ? piece : 0),
                       live);
    }
    wait_for_previous();
    if (lane / 4 < heads) load_quarter(q, args.qkv + position * stride + (first_head + lane / 4) * kHeadDim);
    load_keys(first_tile, false, true);
    load_values(first_tile, false, true);
    copy_commit();
    // No x is needed here, so that the CTAs of one group of heads may fold what was added, asked for long before it is used.
    const bool folds = blockIdx.y == 0 && blockIdx.z == 0 && threadIdx.x < rows;
    long long folded = 0;
    if (folds)
#pragma unroll
        for (int i = 0; i < kAddedSums; ++i) folded += __ldcg(args.row.added + i * args.width + split * rows + threadIdx.x);

    // Rows of the products with the values are those of the probabilities.
    const int head = lane / 4 % kHeads;
    float maximum = -INFINITY, sum = 0.f, values[4] = {};
    for (int tile = first_tile; tile * kTile <= position; tile += kSplits) {
        float logits[kKeyGroups][4] = {};
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            const uint32_t a[4] = {q[s * 2], 0, q[s * 2 + 1], 0};
#pragma unroll
            for (int n = 0; n < kKeyGroups; ++n) mma(logits[n], a, keys[n][s * 2], keys[n][s * 2 + 1]);
        }
        const int next_tile = tile + kSplits;
        const bool last = next_tile * kTile > position;
        if (!last) load_keys(next_tile, true, true), load_values(next_tile, true, true);
        copy_commit();

        float largest = -INFINITY;
#pragma unroll
        for (int n = 0; n < kKeyGroups; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int key = tile * kTile + (warp * kKeyGroups + n) * 8 + lane % 4 * 2 + i;
                logits[n][i] = key >= oldest && key <= position ? logits[n][i] * args.scale : -INFINITY;
                largest = fmaxf(largest, logits[n][i]);
            }
        for (int offset = 1; offset < 4; offset *= 2)
            largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
        if (lane % 4 == 0 && lane / 4 < kHeads) shared.maxima[warp][lane / 4] = largest;
        __syncthreads();

        float next = maximum;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) next = fmaxf(next, shared.maxima[w][head]);
        const float rescale = exp2f(maximum - next);
        maximum = next;
        if (lane / 4 < kHeads) {
            auto *to = reinterpret_cast<uint32_t *>(shared.probabilities);
            float part = 0.f;
#pragma unroll
            for (int n = 0; n < kKeyGroups; ++n) {
                const float p0 = exp2f(logits[n][0] - next), p1 = exp2f(logits[n][1] - next);
                const uint32_t first = pack(p0, p1);
                const float2 rounded = unpack(first);
                const int piece = warp * kKeyGroups + n;
                to[swizzled(lane / 4, piece, kTile / 8) * 4 + lane % 4] = first;
                to[swizzled(lane / 4 + kHeads, piece, kTile / 8) * 4 + lane % 4] = pack(p0 - rounded.x, p1 - rounded.y);
                part += p0 + p1;
            }
            for (int offset = 1; offset < 4; offset *= 2)
                part += __shfl_xor_sync((1u << kHeads * 4) - 1, part, offset);
            if (lane % 4 == 0) shared.sums[warp][lane / 4] = part;
        }
        copy_wait<1>();
        __syncthreads();

        sum *= rescale;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += shared.sums[w][head];
        values[0] *= rescale, values[1] *= rescale;
        const uint4 *of_tile = shared.values[tile / kSplits % 2];
#pragma unroll
        for (int s = 0; s < kTile / 32; ++s) {
            uint32_t p[2][4];
#pragma unroll
            for (int i = 0; i < 2; ++i)
                load_matrices(p[i], shared_address(shared.probabilities +
                                                   swizzled(lane % (2 * kHeads), s * 4 + i * 2 + lane / 16, kTile / 8)));
            uint32_t b[4];
            load_matrices_transposed(b, shared_address(of_tile + swizzled(s * 32 + lane, warp, kPieces)));
            mma(values, p[0], b[0], b[1]);
            mma(values, p[1], b[2], b[3]);
        }
        if (last) break;
        __syncthreads();
    }

    // All others have made their barriers. What they send may count before it is expected: the phase waits for this arrival.
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
    if (threadIdx.x == 0) barrier_expect(joined, sizeof(shared.parts) + sizeof(shared.statistics));
    // What belongs to the rest lies two rows below.
    const float2 pair = {values[0] + __shfl_down_sync(0xffffffffu, values[0], 4 * kHeads),
                         values[1] + __shfl_down_sync(0xffffffffu, values[1], 4 * kHeads)};
    if (lane / 4 < kHeads) send(&shared.parts[split][lane / 4 * (kHeadDim / 2) + warp * 4 + lane % 4], pair, joined);
    if (warp == 0 && lane % 4 == 0 && lane / 4 < kHeads)
        send(&shared.statistics[split][lane / 4], {maximum, sum}, joined);
    if (threadIdx.x < kColumns) {
        const int of_head = threadIdx.x / kHeadDim;
        barrier_wait(joined, 0);
        float largest = -INFINITY, total = 0.f, value = 0.f;
#pragma unroll
        for (int s = 0; s < kSplits; ++s) largest = fmaxf(largest, shared.statistics[s][of_head].x);
#pragma unroll
        for (int s = 0; s < kSplits; ++s) {
            const float2 statistics = shared.statistics[s][of_head];
            const float weight = exp2f(statistics.x - largest);
            total += weight * statistics.y;
            value += weight * reinterpret_cast<const float *>(shared.parts[s])[threadIdx.x];
        }
        value = of_head < heads ? value / total : 0.f;
        const bf16 rounded = __float2bfloat16(value);
        shared.attended[0][threadIdx.x] = rounded;
        shared.attended[1][threadIdx.x] = __float2bfloat16(value - __bfloat162float(rounded));
    }
    copy_wait<0>();
    __syncthreads();

    // A warp takes a quarter of the columns, and every second group of 16 rows. Columns of the product by turns of the rounded
    // values and the rest.
    const int block = warp % 4;
    const auto *attended = reinterpret_cast<const uint32_t *>(shared.attended[lane / 4 % 2]) + block * 16 + lane % 4;
    uint32_t b[2][2];
#pragma unroll
    for (int s = 0; s < 2; ++s) b[s][0] = attended[s * 8], b[s][1] = attended[s * 8 + 4];
    // All groups at once, those that are not there as the last one, for each alone would take the latency of its products.
    constexpr int kGroups = kMaxRows / 32;
    const int first_row = warp / 4 * 16;
    float c[kGroups][4] = {};
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int i = 0; i < kGroups; ++i) {
            const int row = min(first_row + i * 32, rows - 16);
            uint32_t a[4];
            load_matrices(a, shared_address(matrix) + (row + lane % 16) * kPitch + block * 64 + s * 32 + lane / 16 * 16);
            mma(c[i], a, b[s][0], b[s][1]);
        }
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
        float *to = shared.products[block] + first_row + i * 32 + lane / 4;
        if (lane % 4 == 0 && first_row + i * 32 < rows) to[0] = c[i][0] + c[i][1], to[8] = c[i][2] + c[i][3];
    }
    __syncthreads();
    if (threadIdx.x >= rows) return;
    const int column = split * rows + threadIdx.x;
    long long value = to_fixed((shared.products[0][threadIdx.x] + shared.products[1][threadIdx.x]) +
                                   (shared.products[2][threadIdx.x] + shared.products[3][threadIdx.x]),
                               args.row.broken);
    if (folds) {
        if (args.bias) value += to_fixed(__bfloat162float(args.bias[column]), args.row.broken);
        value += folded;
#pragma unroll
        for (int i = 0; i < kAddedSums; ++i) args.row.added[i * args.width + column] = 0;
    }
    add(args.row.x + column, value);
}

}  // namespace

extern "C" int32_t gleaner_row_sm90_attention(int64_t *row, const void *qkv, const void *weight, const void *bias,
                                              const int32_t *position, int32_t num_heads, int32_t num_kv_heads,
                                              int32_t window, int32_t width, void *stream) {
    constexpr float kLog2E = 1.4426950408889634f;
    const Args args{fixed_row(row, width),
                    static_cast<const bf16 *>(qkv),
                    static_cast<const uint4 *>(weight),
                    static_cast<const bf16 *>(bias),
                    position,
                    num_heads,
                    num_kv_heads,
                    window,
                    width,
                    // The logarithm's base is two, so that the exponential is one instruction.
                    kLog2E / sqrtf(static_cast<float>(kHeadDim))};
    const int group = num_heads / num_kv_heads;
    return launch_row(row_attention_kernel, dim3(kSplits, num_kv_heads, divide_up(group, kHeads)), kThreads,
                      width / kSplits * kPitch, stream, args);
}
