// From scores to the next prompt, in one CTA: box filter, exact top-k, sentences, capacity, and the next step's tokens.
#include <math.h>

#include "common.cuh"
#include "kernels.h"

namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kBins = 2048;  // of a radix pass: 11, 11 and 10 bits

// A sentence of the next prompt.
struct Placed {
    const uint32_t *tokens;
    int start, length;
};

struct Shared {
    int warp_sums[kWarps];
    union {
        int histogram[kBins];
        Placed placed[kThreads];
    };
    int prefix, remaining;
};

// Sum of `value` over all threads of lower index. Every thread must call it; `total` becomes the sum over all.
__device__ int scan(Shared &shared, int value, int &total) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    int inclusive = value;
    for (int offset = 1; offset < 32; offset *= 2) {
        const int left = __shfl_up_sync(0xffffffffu, inclusive, offset);
        if (lane >= offset) inclusive += left;
    }
    __syncthreads();
    if (lane == 31) shared.warp_sums[warp] = inclusive;
    __syncthreads();
    int before = 0;
    total = 0;
    for (int w = 0; w < kWarps; ++w) {
        if (w < warp) before += shared.warp_sums[w];
        total += shared.warp_sums[w];
    }
    return before + inclusive - value;
}

__device__ int length(const GleanerPlan &plan, uint32_t sentence) {
    return plan.sentence_offsets[sentence + 1] - plan.sentence_offsets[sentence];
}

// Writes the prompt of step `chunk`: prefix, kept sentences, the chunk, tail.
__device__ void assemble(Shared &shared, const GleanerPlan &plan, const GleanerLoop &loop, int chunk, int kept) {
    const int first = plan.chunk_offsets[chunk];
    const int sentences = kept + plan.chunk_offsets[chunk + 1] - first;
    int context_tokens = 0;
    for (int base = 0; base < sentences; base += kThreads) {
        const int i = base + threadIdx.x;
        const uint32_t sentence = i < kept ? loop.kept[i] : first + i - kept;
        const uint32_t from = i < sentences ? plan.sentence_offsets[sentence] : 0;
        const int count = i < sentences ? plan.sentence_offsets[sentence + 1] - from : 0;
        int total;
        const int start = context_tokens + scan(shared, count, total);
        shared.placed[threadIdx.x] = {plan.tokens + from, start, count};
        // A sentence has at least one token, so that more than max_tokens of them do not fit either.
        if (i < sentences && i < loop.max_tokens) {
            loop.sentences[i] = sentence;
            loop.starts[i] = start;
        }
        context_tokens += total;
        __syncthreads();
        for (int p = threadIdx.x / 32; p < min(kThreads, sentences - base); p += kWarps) {
            const Placed placed = shared.placed[p];
            const int end = min(placed.length, loop.max_tokens - plan.prefix_len - placed.start);
            for (int t = threadIdx.x % 32; t < end; t += 32) {
                loop.prompt[plan.prefix_len + placed.start + t] = placed.tokens[t];
                loop.owner[placed.start + t] = base + p;
            }
        }
        __syncthreads();
    }
    const int tokens = plan.prefix_len + context_tokens + plan.tail_len;
    const bool fits = tokens <= loop.max_tokens && sentences <= loop.max_tokens;
    if (fits) {
        for (int t = threadIdx.x; t < plan.prefix_len; t += kThreads) loop.prompt[t] = plan.prefix[t];
        for (int t = threadIdx.x; t < plan.tail_len; t += kThreads)
            loop.prompt[plan.prefix_len + context_tokens + t] = plan.tail[t];
    }
    if (threadIdx.x == 0) {
        GleanerState &state = *loop.state;
        state.chunk = chunk;
        state.tokens = fits ? tokens : 0;
        state.context_tokens = context_tokens;
        state.context_sentences = sentences;
        state.question_offset = plan.question_start;
        state.question_start = plan.prefix_len + context_tokens + plan.question_start;
        state.question_rows = plan.tail_len - plan.question_start;
        if (!fits) state.error |= GLEANER_ERROR_CAPACITY;
    }
}

// The score, as an integer of the same order, that the last of the `k` best has; `remaining` of those that have exactly
// it are among them. Scores are at least 0, so that their bits are in order.
__device__ uint32_t threshold(Shared &shared, const float *scores, int count, int k, int &remaining) {
    uint32_t prefix = 0;
    int shift = 32;
    remaining = k;
    for (int pass = 0; pass < 3; ++pass) {
        const int bits = pass < 2 ? 11 : 10;
        shift -= bits;
        for (int bin = threadIdx.x; bin < kBins; bin += kThreads) shared.histogram[bin] = 0;
        __syncthreads();
        for (int base = 0; base < count; base += kThreads) {
            const int c = base + threadIdx.x;
            const uint32_t key = c < count ? __float_as_uint(scores[c]) : 0;
            const bool counts = c < count && (shift + bits == 32 || key >> (shift + bits) == prefix);
            // Scores crowd in few bins, so that lanes of the same bin add together.
            const uint32_t bin = counts ? key >> shift & ((1u << bits) - 1) : kBins;
            const uint32_t same = __match_any_sync(0xffffffffu, bin);
            if (counts && threadIdx.x % 32 == __ffs(same) - 1) atomicAdd(&shared.histogram[bin], __popc(same));
        }
        __syncthreads();
        // Bins from the largest down: two a thread.
        const int high = kBins - 1 - 2 * threadIdx.x;
        const int in_high = shared.histogram[high], in_low = shared.histogram[high - 1];
        int total;
        const int above = scan(shared, in_high + in_low, total);
        if (above < remaining && above + in_high + in_low >= remaining) {
            const bool is_high = above + in_high >= remaining;
            shared.prefix = prefix << bits | (is_high ? high : high - 1);
            shared.remaining = remaining - above - (is_high ? 0 : in_high);
        }
        __syncthreads();
        prefix = shared.prefix;
        remaining = shared.remaining;
        __syncthreads();
    }
    return prefix;
}

// Order in which kept sentences go when there are too many: by score, of equal scores the earlier first.
__device__ unsigned long long rank(const GleanerLoop &loop, int i) {
    return static_cast<unsigned long long>(loop.best[i]) << 32 | loop.sentences[i];
}

// Tokens of the selected sentences of at least `least` rank.
__device__ int tokens_from(Shared &shared, const GleanerPlan &plan, const GleanerLoop &loop, int sentences,
                           unsigned long long least) {
    int mine = 0, total;
    for (int i = threadIdx.x; i < sentences; i += kThreads)
        if (loop.selected[i] && rank(loop, i) >= least) mine += length(plan, loop.sentences[i]);
    scan(shared, mine, total);
    return total;
}

__global__ void __launch_bounds__(kThreads, 1) start_kernel(GleanerPlan plan, GleanerLoop loop) {
    __shared__ Shared shared;
    if (threadIdx.x == 0) *loop.state = GleanerState{};
    __syncthreads();
    assemble(shared, plan, loop, 0, 0);
}

__global__ void __launch_bounds__(kThreads, 1) select_kernel(GleanerPlan plan, GleanerLoop loop) {
    __shared__ Shared shared;
    const GleanerState state = *loop.state;
    if (state.tokens == 0) return;
    const int count = state.context_tokens, sentences = state.context_sentences;

    int invalid = 0;
    for (int c = threadIdx.x; c < count; c += kThreads) {
        const int from = max(0, c - plan.phrase_width / 2);
        const int to = min(count, c + (plan.phrase_width + 1) / 2);
        double sum = 0.;
        for (int t = from; t < to; ++t) sum += loop.scores[t];
        const bool finite = isfinite(static_cast<float>(sum));
        invalid |= !finite;
        loop.phrase_scores[c] = finite ? static_cast<float>(sum) : 0.f;
    }
    for (int i = threadIdx.x; i < sentences; i += kThreads) {
        loop.best[i] = 0;
        loop.selected[i] = 0;
    }
    invalid = __syncthreads_or(invalid);

    int remaining = 0;
    const bool all = plan.topk >= count;
    const uint32_t least = all ? 0 : threshold(shared, loop.phrase_scores, count, plan.topk, remaining);
    // From the right, for of equal scores the larger index wins.
    for (int base = 0; base < count; base += kThreads) {
        const int c = count - 1 - base - static_cast<int>(threadIdx.x);
        const uint32_t key = c >= 0 ? __float_as_uint(loop.phrase_scores[c]) : 0;
        const bool tied = c >= 0 && !all && key == least;
        int total;
        const int ties_before = scan(shared, tied, total);
        if (c >= 0) {
            const int owner = loop.owner[c];
            if (all || key > least || (tied && ties_before < remaining)) loop.selected[owner] = 1;
            atomicMax(&loop.best[owner], key);
        }
        remaining -= total;
    }
    __syncthreads();

    unsigned long long least_rank = 0;
    if (tokens_from(shared, plan, loop, sentences, 0) > plan.max_retained) {
        // The smallest rank from which on all fit.
        unsigned long long too_low = 0, fits = ~0ull;
        while (fits - too_low > 1) {
            const unsigned long long middle = too_low + (fits - too_low) / 2;
            (tokens_from(shared, plan, loop, sentences, middle) > plan.max_retained ? too_low : fits) = middle;
        }
        least_rank = fits;
    }
    int kept = 0, dropped = 0;
    for (int base = 0; base < sentences; base += kThreads) {
        const int i = base + threadIdx.x;
        const bool selected = i < sentences && loop.selected[i];
        const bool stays = selected && rank(loop, i) >= least_rank;
        int total, logged;
        const int before = scan(shared, stays, total);
        const int in_log = scan(shared, selected, logged);
        if (stays) loop.kept[kept + before] = loop.sentences[i];
        if (selected) {
            const size_t at = static_cast<size_t>(state.chunk) * loop.max_log + kept + dropped + in_log;
            loop.log[at] = {loop.sentences[i], stays ? 1u : 0u, __uint_as_float(loop.best[i])};
        }
        kept += total;
        dropped += logged - total;
    }
    const int kept_tokens = tokens_from(shared, plan, loop, sentences, least_rank);
    __syncthreads();
    if (threadIdx.x == 0) {
        loop.state->kept = kept;
        loop.state->kept_tokens = kept_tokens;
        loop.state->dropped_for_capacity += dropped;
        if (invalid) loop.state->error |= GLEANER_ERROR_NOT_FINITE;
        loop.state->tokens = 0;
        loop.step_log[state.chunk] = {state.tokens, count, kept + dropped, kept_tokens};
    }
    __syncthreads();
    if (state.chunk + 1 < plan.chunks && !invalid) assemble(shared, plan, loop, state.chunk + 1, kept);
}

}  // namespace

extern "C" int32_t gleaner_start(const GleanerLoop *loop, const GleanerPlan *plan, void *stream) {
    start_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*plan, *loop);
    return cudaGetLastError();
}

extern "C" int32_t gleaner_select(const GleanerLoop *loop, const GleanerPlan *plan, void *stream) {
    select_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*plan, *loop);
    return cudaGetLastError();
}
