// The final layer's attention from the question to the context, as scores, in two launches.
//
// gleaner_question_logits: a CTA has 128 keys, one head and 16 question rows, a warp 32 of the keys; it writes their logits
// and, per row, the maximum and the sum of exponentials over its keys. The CTA that ends last of a head and its rows joins
// these, in order of block.
// gleaner_question_scores: a CTA has 16 columns and 48 rows at a time, a thread one of each. It sums the probabilities over
// heads in order of head and writes that sum out. A column's score has 16 shares, of every 16th row one, to which the rows'
// sums are added with their weights, squared; the shares are added in order. In the first step each CTA computes the
// weights itself, the same to the bit.
#include <math.h>

#include "common.cuh"
#include "kernels.h"

namespace {

constexpr int kLogitThreads = 128;                  // keys of a CTA
constexpr int kLogitRows = 16;                      // question rows of a CTA
constexpr int kScoreColumns = 16, kScoreRows = 48;  // of a CTA, at a time
constexpr int kShares = 16;                         // of a score
constexpr int kScoreThreads = kScoreColumns * kScoreRows;
constexpr int kScoreHeads = 16;                     // of which a thread's logits are on their way together

struct LogitArgs {
    float *logits;        // [num_heads, max_rows, stride_of(max_tokens)]
    float2 *row_stats;    // (maximum, 1 / sum) [num_heads, max_rows]
    float2 *block_stats;  // (maximum, sum) [num_heads, max_rows, blocks]
    int32_t *done;        // blocks [num_heads, groups of rows]
    const bf16 *q;        // [question_rows, num_heads * head_dim]
    const bf16 *k;        // [tokens, num_kv_heads * head_dim]
    const GleanerState *state;
    int max_rows, max_tokens, num_heads, num_kv_heads, window;
    float scale;
};

__device__ int blocks_of(int tokens) { return (tokens + kLogitThreads - 1) / kLogitThreads; }

// Rows of logits start at multiples of 16 bytes.
__device__ int stride_of(int max_tokens) { return (max_tokens + 3) / 4 * 4; }

// Joins the blocks' statistics of `count` rows from `row0`, eight lanes a row.
__device__ void join(const LogitArgs &args, int head, int row0, int count, int blocks) {
    constexpr int kLanes = kLogitThreads / kLogitRows;
    const int r = min(static_cast<int>(threadIdx.x) / kLanes, count - 1), lane = threadIdx.x % kLanes;
    const size_t row = static_cast<size_t>(head) * args.max_rows + row0 + r;
    const float2 *parts = args.block_stats + row * blocks_of(args.max_tokens);
    float maximum = -INFINITY;
#pragma unroll 4
    for (int b = lane; b < blocks; b += kLanes) maximum = fmaxf(maximum, parts[b].x);
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
        maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, offset));
    float sum = 0.f;
    for (int first = 0; first < blocks; first += kLanes) {
        const float2 part = first + lane < blocks ? parts[first + lane] : float2{-INFINITY, 0.f};
        const float rescale = part.x == -INFINITY ? 0.f : expf(part.x - maximum);
#pragma unroll
        for (int of = 0; of < kLanes; ++of)
            sum = fmaf(__shfl_sync(0xffffffffu, part.y, of, kLanes), __shfl_sync(0xffffffffu, rescale, of, kLanes), sum);
    }
    if (lane == 0) args.row_stats[row] = {maximum, 1.f / sum};
}

template <int kHeadDim>
__global__ void __launch_bounds__(kLogitThreads) logits_kernel(LogitArgs args) {
    constexpr int kSteps = kHeadDim / 16;    // of a product over the dimensions
    constexpr int kVectors = kHeadDim / 32;  // of 16 bytes, of a lane's quarter of a key or query
    constexpr int kTiles = 4;                // of eight keys, of a warp
    __shared__ float2 warp_stats[kLogitRows][kLogitThreads / 32];
    __shared__ bool last_block;
    wait_for_previous();
    // Only now, so that the next two kernels may take for granted what was written before this one.
    start_next();
    const int tokens = args.state->tokens, rows = args.state->question_rows, row0 = blockIdx.z * kLogitRows;
    if (blockIdx.x * kLogitThreads >= tokens || row0 >= rows) return;
    const int head = blockIdx.y, kv_head = head / (args.num_heads / args.num_kv_heads);
    const int count = min(kLogitRows, rows - row0), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first_key = blockIdx.x * kLogitThreads + warp * 32;

    // The order of the dimensions in a product is free as long as keys and queries agree: lane % 4 takes a quarter that
    // lies in one piece. Words 2 s and 2 s + 1 of it are what step s wants.
    auto load_quarter = [&](uint32_t (&to)[kSteps * 2], const bf16 *row) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            const uint4 four = reinterpret_cast<const uint4 *>(row + lane % 4 * (kHeadDim / 4))[i];
            to[i * 4] = four.x, to[i * 4 + 1] = four.y, to[i * 4 + 2] = four.z, to[i * 4 + 3] = four.w;
        }
    };
    // So is the order of the keys: a lane gets the logits of four neighbours in two tiles.
    auto key_of = [&](int tile, int column) {
        return first_key + tile / 2 * 16 + column / 2 * 4 + tile % 2 * 2 + column % 2;
    };
    uint32_t k[kTiles][kSteps * 2] = {}, q[2][kSteps * 2] = {};
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
        const int key = key_of(tile, lane / 4);
        if (key < tokens)
            load_quarter(k[tile], args.k + (static_cast<size_t>(key) * args.num_kv_heads + kv_head) * kHeadDim);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = row0 + lane / 4 + half * 8;
        if (row < rows) load_quarter(q[half], args.q + (static_cast<size_t>(row) * args.num_heads + head) * kHeadDim);
    }
    float logits[kTiles][4] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
        const uint32_t a[4] = {q[0][s * 2], q[1][s * 2], q[0][s * 2 + 1], q[1][s * 2 + 1]};
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) mma(logits[tile], a, k[tile][s * 2], k[tile][s * 2 + 1]);
    }

    const int stride = stride_of(args.max_tokens);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = row0 + lane / 4 + half * 8, position = args.state->question_start + row;
        float maximum = -INFINITY;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float &logit = logits[tile][half * 2 + i];
                const int key = key_of(tile, lane % 4 * 2 + i);
                const bool visible = key <= position && !(args.window && key <= position - args.window);
                logit = visible ? logit * args.scale : -INFINITY;
                maximum = fmaxf(maximum, logit);
            }
        }
        float *to = args.logits + (static_cast<size_t>(head) * args.max_rows + row) * stride;
#pragma unroll
        for (int tile = 0; tile < kTiles; tile += 2) {
            const int key = key_of(tile, lane % 4 * 2);
            if (row < rows && key < stride)
                *reinterpret_cast<float4 *>(to + key) = {logits[tile][half * 2], logits[tile][half * 2 + 1],
                                                         logits[tile + 1][half * 2], logits[tile + 1][half * 2 + 1]};
        }
        for (int offset = 1; offset < 4; offset *= 2)
            maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, offset));
        float sum = 0.f;
        if (maximum != -INFINITY) {
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile)
#pragma unroll
                for (int i = 0; i < 2; ++i) sum += expf(logits[tile][half * 2 + i] - maximum);
        }
        for (int offset = 1; offset < 4; offset *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        if (lane % 4 == 0) warp_stats[lane / 4 + half * 8][warp] = {maximum, sum};
    }
    __syncthreads();
    const int blocks = blocks_of(tokens);
    if (threadIdx.x < count) {
        float2 all{-INFINITY, 0.f};
        for (const float2 &part : warp_stats[threadIdx.x]) all.x = fmaxf(all.x, part.x);
        for (const float2 &part : warp_stats[threadIdx.x])
            if (part.x != -INFINITY) all.y += part.y * expf(part.x - all.x);
        const size_t row = static_cast<size_t>(head) * args.max_rows + row0 + threadIdx.x;
        args.block_stats[row * blocks_of(args.max_tokens) + blockIdx.x] = all;
    }
    __syncthreads();
    int32_t *done = args.done + head * gridDim.z + blockIdx.z;
    if (threadIdx.x == 0) {
        // Orders what the CTA wrote before the count, and the count before what it reads of others.
        int32_t before;
        asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(done) : "memory");
        last_block = before == blocks - 1;
    }
    __syncthreads();
    if (!last_block) return;
    join(args, head, row0, count, blocks);
    if (threadIdx.x == 0) *done = 0;
}

struct ScoreArgs {
    double *scores;      // [context_tokens]
    float *head_sums;    // [max_rows, max_tokens]
    float *row_weights;  // [max_rows], written in the first step
    const float *logits;
    const float2 *row_stats;
    const GleanerState *state;
    int max_rows, max_tokens, num_heads;
};

__global__ void __launch_bounds__(kScoreThreads, 1) scores_kernel(ScoreArgs args) {
    extern __shared__ float2 stats[];  // (maximum, 1 / sum) [num_heads, kScoreRows]
    __shared__ float weights[kScoreRows];
    __shared__ double terms[kScoreRows][kScoreColumns];
    start_next();
    // The state is there: the kernel before has waited for those that wrote it.
    const int tokens = args.state->tokens, rows = args.state->question_rows;
    const int lane = threadIdx.x % kScoreColumns, r = threadIdx.x / kScoreColumns;
    const int column = blockIdx.x * kScoreColumns + lane;
    const int question_start = args.state->question_start;
    const int context_start = question_start - args.state->question_offset - args.state->context_tokens;
    const int context_tokens = args.state->context_tokens;
    const bool first_step = args.state->chunk == 0;
    wait_for_previous();
    if (blockIdx.x * kScoreColumns >= tokens) return;

    const size_t stride = stride_of(args.max_tokens), head_stride = args.max_rows * stride;
    auto load = [&](float (&to)[kScoreHeads], int first_head, int row, int c) {
        const float *from = args.logits + first_head * head_stride + row * stride + c;
#pragma unroll
        for (int h = 0; h < kScoreHeads; ++h, from += head_stride)
            if (first_head + h < args.num_heads) to[h] = *from;
    };
    // Probabilities of row row0 + of and a column, summed over heads, of which the first ones' logits are there.
    auto head_sum = [&](float (&logits)[kScoreHeads], int row0, int of, int c) {
        float sum = 0.f;
        for (int first = 0; first < args.num_heads; first += kScoreHeads) {
            if (first > 0) load(logits, first, row0 + of, c);
#pragma unroll
            for (int h = 0; h < kScoreHeads; ++h) {
                if (first + h >= args.num_heads) break;
                const float2 stat = stats[(first + h) * kScoreRows + of];
                sum += expf(logits[h] - stat.x) * stat.y;
            }
        }
        return sum;
    };

    double share = 0.;
    for (int row0 = 0; row0 < rows; row0 += kScoreRows) {
        const int count = min(kScoreRows, rows - row0);
        const bool live = r < count && column < tokens;
        float logits[kScoreHeads];
        if (live) load(logits, 0, row0 + r, column);
        __syncthreads();
        for (int i = threadIdx.x; i < args.num_heads * kScoreRows; i += kScoreThreads)
            if (i % kScoreRows < count)
                stats[i] = args.row_stats[i / kScoreRows * args.max_rows + row0 + i % kScoreRows];
        if (!first_step && threadIdx.x < count) weights[threadIdx.x] = args.row_weights[row0 + threadIdx.x];
        __syncthreads();
        float sum = 0.f;
        if (live) {
            sum = head_sum(logits, row0, r, column);
            args.head_sums[static_cast<size_t>(row0 + r) * args.max_tokens + column] = sum;
        }
        if (first_step) {
            // A warp for each row.
            for (int of = threadIdx.x / 32; of < count; of += kScoreThreads / 32) {
                float weight = 0.f;
                for (int c = question_start + threadIdx.x % 32; c < tokens; c += 32) {
                    load(logits, 0, row0 + of, c);
                    weight += head_sum(logits, row0, of, c);
                }
                for (int offset = 16; offset > 0; offset /= 2) weight += __shfl_xor_sync(0xffffffffu, weight, offset);
                if (threadIdx.x % 32 > 0) continue;
                weights[of] = weight;
                if (blockIdx.x == 0) args.row_weights[row0 + of] = weight;
            }
            __syncthreads();
        }
        if (live) terms[r][lane] = static_cast<double>(weights[r]) * sum;
        __syncthreads();
        if (r < kShares && column < tokens)
            for (int i = r; i < count; i += kShares) share += static_cast<double>(weights[i]) * terms[i][lane];
    }
    __syncthreads();
    if (r < kShares) terms[r][lane] = share;
    __syncthreads();
    if (r > 0) return;
    double score = 0.;
    for (int i = 0; i < kShares; ++i) score += terms[i][lane];
    const int context_column = column - context_start;
    if (context_column >= 0 && context_column < context_tokens) args.scores[context_column] = score;
}

}  // namespace

extern "C" int32_t gleaner_question_logits(float *logits, void *row_stats, void *block_stats, int32_t *done,
                                           const void *q, const void *k, const GleanerState *state, int32_t max_rows,
                                           int32_t max_tokens, int32_t num_heads, int32_t num_kv_heads,
                                           int32_t head_dim, int32_t window, void *stream) {
    const LogitArgs args{logits,
                         static_cast<float2 *>(row_stats),
                         static_cast<float2 *>(block_stats),
                         done,
                         static_cast<const bf16 *>(q),
                         static_cast<const bf16 *>(k),
                         state,
                         max_rows,
                         max_tokens,
                         num_heads,
                         num_kv_heads,
                         window,
                         1.f / sqrtf(static_cast<float>(head_dim))};
    const dim3 grid((max_tokens + kLogitThreads - 1) / kLogitThreads, num_heads,
                    (max_rows + kLogitRows - 1) / kLogitRows);
    switch (head_dim) {
        case 64: return launch_overlapping(logits_kernel<64>, grid, kLogitThreads, 0, stream, args);
        case 128: return launch_overlapping(logits_kernel<128>, grid, kLogitThreads, 0, stream, args);
        default: return cudaErrorInvalidValue;
    }
}

extern "C" int32_t gleaner_question_scores(double *scores, float *head_sums, float *row_weights, const float *logits,
                                           const void *row_stats, const GleanerState *state, int32_t max_rows,
                                           int32_t max_tokens, int32_t num_heads, void *stream) {
    const ScoreArgs args{scores, head_sums, row_weights, logits, static_cast<const float2 *>(row_stats), state,
                         max_rows, max_tokens, num_heads};
    const int blocks = (max_tokens + kScoreColumns - 1) / kScoreColumns;
    const int shared_bytes = static_cast<int>(sizeof(float2)) * num_heads * kScoreRows;
    return launch_overlapping(scores_kernel, blocks, kScoreThreads, shared_bytes, stream, args);
}
