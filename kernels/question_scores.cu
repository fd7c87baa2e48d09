// The final layer's attention from the question to the context, as scores, in two launches.
//
// gleaner_question_logits: a CTA has 128 keys and one head, a thread one key; it writes the logits of all question rows
// and, per row, the maximum and the sum of exponentials over its keys.
// gleaner_question_scores: a CTA has 32 columns and 16 rows at a time, a thread one of each; it joins the statistics of
// each row in order of block, sums the probabilities over heads in order of head, writes that sum out, and adds it to its
// share of the column's score with the row's weight, squared. The 16 shares are added in order. In the first step each CTA
// computes the weights itself, the same to the bit.
#include <math.h>

#include "common.cuh"
#include "kernels.h"

namespace {

constexpr int kLogitThreads = 128;  // keys of a CTA
constexpr int kLogitRows = 16;      // question rows at a time
constexpr int kScoreColumns = 32, kScoreRows = 16;  // of a CTA, at a time
constexpr int kScoreThreads = kScoreColumns * kScoreRows;

struct LogitArgs {
    float *logits;  // [num_heads, max_rows, max_tokens]
    float2 *stats;  // (maximum, sum) [num_heads, max_rows, blocks]
    const bf16 *q;  // [question_rows, num_heads * head_dim]
    const bf16 *k;  // [tokens, num_kv_heads * head_dim]
    const GleanerState *state;
    int max_rows, max_tokens, num_heads, num_kv_heads, window;
    float scale;
};

__device__ int blocks_of(int tokens) { return (tokens + kLogitThreads - 1) / kLogitThreads; }

template <int kHeadDim>
__global__ void __launch_bounds__(kLogitThreads) logits_kernel(LogitArgs args) {
    const int tokens = args.state->tokens, rows = args.state->question_rows;
    const int key = blockIdx.x * kLogitThreads + threadIdx.x;
    if (blockIdx.x * kLogitThreads >= tokens) return;
    __shared__ __align__(16) float q[kLogitRows][kHeadDim];
    __shared__ float2 warp_stats[kLogitRows][kLogitThreads / 32];
    const int head = blockIdx.y, kv_head = head / (args.num_heads / args.num_kv_heads);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    uint4 k[kHeadDim / 8];
    const bf16 *from = args.k + (static_cast<size_t>(min(key, tokens - 1)) * args.num_kv_heads + kv_head) * kHeadDim;
#pragma unroll
    for (int i = 0; i < kHeadDim / 8; ++i) k[i] = reinterpret_cast<const uint4 *>(from)[i];

    for (int row0 = 0; row0 < rows; row0 += kLogitRows) {
        const int count = min(kLogitRows, rows - row0);
        __syncthreads();
        for (int i = threadIdx.x; i < count * kHeadDim; i += kLogitThreads) {
            const size_t row = row0 + i / kHeadDim;
            q[i / kHeadDim][i % kHeadDim] =
                __bfloat162float(args.q[(row * args.num_heads + head) * kHeadDim + i % kHeadDim]);
        }
        __syncthreads();
        for (int r = 0; r < count; ++r) {
            float logit = 0.f;
#pragma unroll
            for (int i = 0; i < kHeadDim / 8; ++i) {
                const uint32_t pairs[4] = {k[i].x, k[i].y, k[i].z, k[i].w};
#pragma unroll
                for (int p = 0; p < 4; ++p) {
                    const float2 pair = unpack(pairs[p]);
                    logit += q[r][i * 8 + p * 2] * pair.x + q[r][i * 8 + p * 2 + 1] * pair.y;
                }
            }
            const int position = args.state->question_start + row0 + r;
            const bool visible = key <= position && !(args.window && key <= position - args.window);
            logit = visible ? logit * args.scale : -INFINITY;
            if (key < tokens)
                args.logits[(static_cast<size_t>(head) * args.max_rows + row0 + r) * args.max_tokens + key] = logit;
            float maximum = logit;
            for (int offset = 16; offset > 0; offset /= 2)
                maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, offset));
            float sum = maximum == -INFINITY ? 0.f : expf(logit - maximum);
            for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
            if (lane == 0) warp_stats[r][warp] = {maximum, sum};
        }
        __syncthreads();
        if (threadIdx.x < count) {
            float2 all{-INFINITY, 0.f};
            for (const float2 &part : warp_stats[threadIdx.x]) all.x = fmaxf(all.x, part.x);
            for (const float2 &part : warp_stats[threadIdx.x])
                if (part.x != -INFINITY) all.y += part.y * expf(part.x - all.x);
            const size_t row = static_cast<size_t>(head) * args.max_rows + row0 + threadIdx.x;
            args.stats[row * blocks_of(args.max_tokens) + blockIdx.x] = all;
        }
    }
}

struct ScoreArgs {
    double *scores;        // [context_tokens]
    float *head_sums;      // [max_rows, max_tokens]
    float *row_weights;    // [max_rows], written in the first step
    const float *logits;
    const float2 *stats;
    const GleanerState *state;
    int max_rows, max_tokens, num_heads;
};

__global__ void __launch_bounds__(kScoreThreads) scores_kernel(ScoreArgs args) {
    const int tokens = args.state->tokens, rows = args.state->question_rows;
    const int lane = threadIdx.x % kScoreColumns, r = threadIdx.x / kScoreColumns;
    const int column = blockIdx.x * kScoreColumns + lane;
    if (blockIdx.x * kScoreColumns >= tokens) return;
    extern __shared__ float2 row_stats[];  // (maximum, 1 / sum) [num_heads, kScoreRows]
    __shared__ double shares[kScoreRows][kScoreColumns];
    const int question_start = args.state->question_start;
    const bool first_step = args.state->chunk == 0;
    const int blocks = blocks_of(tokens), max_blocks = blocks_of(args.max_tokens);

    // Probabilities of this thread's row and a column, summed over heads.
    auto head_sum = [&](int row0, int c) {
        const float *logits = args.logits + static_cast<size_t>(row0 + r) * args.max_tokens + c;
        const size_t head_stride = static_cast<size_t>(args.max_rows) * args.max_tokens;
        float sum = 0.f;
#pragma unroll 4
        for (int h = 0; h < args.num_heads; ++h) {
            const float2 stat = row_stats[h * kScoreRows + r];
            sum += expf(logits[h * head_stride] - stat.x) * stat.y;
        }
        return sum;
    };

    double share = 0.;
    for (int row0 = 0; row0 < rows; row0 += kScoreRows) {
        const int count = min(kScoreRows, rows - row0);
        __syncthreads();
        for (int i = threadIdx.x; i < args.num_heads * count; i += kScoreThreads) {
            const int h = i / count, of = i % count;
            const float2 *parts = args.stats + (static_cast<size_t>(h) * args.max_rows + row0 + of) * max_blocks;
            float2 all{-INFINITY, 0.f};
#pragma unroll 4
            for (int b = 0; b < blocks; ++b) all.x = fmaxf(all.x, parts[b].x);
#pragma unroll 4
            for (int b = 0; b < blocks; ++b)
                if (parts[b].x != -INFINITY) all.y += parts[b].y * expf(parts[b].x - all.x);
            row_stats[h * kScoreRows + of] = {all.x, 1.f / all.y};
        }
        __syncthreads();
        // A warp for each row.
        if (r < count) {
            float weight = 0.f;
            if (first_step) {
                for (int c = question_start + lane; c < tokens; c += kScoreColumns) weight += head_sum(row0, c);
                for (int offset = 16; offset > 0; offset /= 2) weight += __shfl_xor_sync(0xffffffffu, weight, offset);
                if (blockIdx.x == 0 && lane == 0) args.row_weights[row0 + r] = weight;
            } else {
                weight = args.row_weights[row0 + r];
            }
            if (column < tokens) {
                const float sum = head_sum(row0, column);
                args.head_sums[static_cast<size_t>(row0 + r) * args.max_tokens + column] = sum;
                share += static_cast<double>(weight) * (static_cast<double>(weight) * sum);
            }
        }
    }
    shares[r][lane] = share;
    __syncthreads();
    if (r > 0) return;
    double score = 0.;
    for (int i = 0; i < kScoreRows; ++i) score += shares[i][lane];
    const int context_start = question_start - args.state->question_offset - args.state->context_tokens;
    const int context_column = column - context_start;
    if (context_column >= 0 && context_column < args.state->context_tokens) args.scores[context_column] = score;
}

}  // namespace

extern "C" int32_t gleaner_question_logits(float *logits, void *stats, const void *q, const void *k,
                                           const GleanerState *state, int32_t max_rows, int32_t max_tokens,
                                           int32_t num_heads, int32_t num_kv_heads, int32_t head_dim, int32_t window,
                                           void *stream) {
    const LogitArgs args{logits,   static_cast<float2 *>(stats), static_cast<const bf16 *>(q),
                         static_cast<const bf16 *>(k), state, max_rows, max_tokens, num_heads, num_kv_heads, window,
                         1.f / sqrtf(static_cast<float>(head_dim))};
    const dim3 grid((max_tokens + kLogitThreads - 1) / kLogitThreads, num_heads);
    auto *on = static_cast<cudaStream_t>(stream);
    switch (head_dim) {
        case 64: logits_kernel<64><<<grid, kLogitThreads, 0, on>>>(args); break;
        case 128: logits_kernel<128><<<grid, kLogitThreads, 0, on>>>(args); break;
        default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}

extern "C" int32_t gleaner_question_scores(double *scores, float *head_sums, float *row_weights, const float *logits,
                                           const void *stats, const GleanerState *state, int32_t max_rows,
                                           int32_t max_tokens, int32_t num_heads, void *stream) {
    const ScoreArgs args{scores, head_sums, row_weights, logits, static_cast<const float2 *>(stats), state,
                         max_rows, max_tokens, num_heads};
    const int blocks = (max_tokens + kScoreColumns - 1) / kScoreColumns;
    const size_t shared_bytes = sizeof(float2) * num_heads * kScoreRows;
    scores_kernel<<<blocks, kScoreThreads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args);
    return cudaGetLastError();
}
