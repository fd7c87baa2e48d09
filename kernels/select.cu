// From scores to the next prompt, in one CTA: box filter, exact top-k, sentences, capacity, and the next step's tokens.
//
// What it takes is latency: of memory, of barriers, of code that runs once. So what is read again lies in shared memory if
// it fits, a sum over the CTA costs one barrier, and what does not depend on the scores is fetched while they are computed.
#include <math.h>

#include "common.cuh"
#include "kernels.h"

namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kBins = 2048;          // of a radix pass: 11, 11 and 9 bits
constexpr int kSharedTokens = 7168;  // of a context that fits in the shared memory of every GPU from 8.0 on

constexpr uint32_t kAll = 0xffffffffu;
constexpr uint32_t kTaken = 1u << 31;  // beside the bits of a score, which is at least 0

struct Shared {
    int warp_sums[2][kWarps];
    union {
        int histogram[kBins];
        // Of a sentence of the next prompt: its first token there, and the distance of its tokens in the plan from it.
        struct {
            int starts[kThreads], shifts[kThreads];
        } placed;
    };
    uint32_t prefix;
    int room, tied;
};

// Sums over the CTA, in which all threads take part. They write to two places in turn, for a thread may still read the last.
struct Sums {
    Shared &shared;
    int turn = 0;

    // Sum of `value` over all threads of lower index; `total` becomes the sum over all.
    __device__ int before(int value, int &total) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        int inclusive = value;
        for (int offset = 1; offset < 32; offset *= 2) {
            const int left = __shfl_up_sync(kAll, inclusive, offset);
            if (lane >= offset) inclusive += left;
        }
        const int *sums = share(inclusive);
        const int of_warp = sums[lane];
        total = __reduce_add_sync(kAll, of_warp);
        return __reduce_add_sync(kAll, lane < warp ? of_warp : 0) + inclusive - value;
    }

    // Sum of `value` over all threads.
    __device__ int total(int value) {
        const int *sums = share(__reduce_add_sync(kAll, value));
        return __reduce_add_sync(kAll, sums[threadIdx.x % 32]);
    }

  private:
    // Hands round what the last lane of each warp has.
    __device__ const int *share(int of_warp) {
        static_assert(kWarps == 32, "a lane for each warp");
        int *sums = shared.warp_sums[turn ^= 1];
        if (threadIdx.x % 32 == 31) sums[threadIdx.x / 32] = of_warp;
        __syncthreads();
        return sums;
    }
};

// Where a sentence lies in the plan.
struct Place {
    uint32_t sentence;
    int from, length;
};

__device__ Place place(const GleanerPlan &plan, uint32_t sentence) {
    const int from = plan.sentence_offsets[sentence];
    return {sentence, from, static_cast<int>(plan.sentence_offsets[sentence + 1]) - from};
}

// Sentences and tokens of a chunk.
struct Chunk {
    int first, sentences, from, tokens;
};

__device__ Chunk chunk_at(const GleanerPlan &plan, int chunk) {
    const int first = plan.chunk_offsets[chunk], last = plan.chunk_offsets[chunk + 1];
    const int from = plan.sentence_offsets[first];
    return {first, last - first, from, static_cast<int>(plan.sentence_offsets[last]) - from};
}

// Brings words to the L2 cache.
__device__ void fetch(const uint32_t *words, int count) {
    constexpr int kLine = 128 / 4;
    for (int i = threadIdx.x * kLine; i < count; i += kThreads * kLine)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(words + i));
}

// Writes the prompt of step `index`: prefix, kept sentences, its chunk, tail. The kept ones are the first of
// loop.sentences, of `kept_tokens` together. Its first `same_tokens` are those of the step before.
__device__ void assemble(Sums &sums, const GleanerPlan &plan, const GleanerLoop &loop, int index, const Chunk &chunk,
                         int kept, int kept_tokens, int same_tokens) {
    const int sentences = kept + chunk.sentences, context_tokens = kept_tokens + chunk.tokens;
    const int tokens = plan.prefix_len + context_tokens + plan.tail_len;
    const bool fits = tokens <= loop.max_tokens;
    if (threadIdx.x == 0) {
        GleanerState &state = *loop.state;
        state.chunk = index;
        const int first_row = fits && loop.reuses ? same_tokens : 0;
        const int question_start = plan.prefix_len + context_tokens + plan.question_start;
        state.tokens = fits ? tokens : 0;
        state.first_row = first_row;
        state.rows = fits ? tokens - first_row : 0;
        state.context_tokens = context_tokens;
        state.context_sentences = sentences;
        state.question_offset = plan.question_start;
        // Of a prompt that does not fit nothing is read: a recorded step goes on to the products of these rows.
        state.question_start = fits ? question_start : 0;
        state.question_row = fits ? question_start - first_row : 0;
        state.question_rows = fits ? plan.tail_len - plan.question_start : 0;
        if (!fits) state.error |= GLEANER_ERROR_CAPACITY;
    }
    if (!fits) return;
    for (int t = threadIdx.x; t < plan.prefix_len; t += kThreads) loop.prompt[t] = __ldg(plan.prefix + t);
    for (int t = threadIdx.x; t < plan.tail_len; t += kThreads)
        loop.prompt[plan.prefix_len + context_tokens + t] = __ldg(plan.tail + t);

    // A sentence has at least one token, so that `sentences` of them have places.
    auto &placed = sums.shared.placed;
    uint32_t *context = loop.prompt + plan.prefix_len;
    for (int base = 0, start = 0; base < sentences; base += kThreads) {
        const int i = base + threadIdx.x;
        Place own{};
        if (i < sentences) own = place(plan, i < kept ? loop.sentences[i] : chunk.first + i - kept);
        if (i >= kept && i < sentences) loop.sentences[i] = own.sentence;
        int total;
        const int own_start = start + sums.before(own.length, total);
        placed.starts[threadIdx.x] = own_start;
        placed.shifts[threadIdx.x] = own.from - own_start;
        __syncthreads();
        int steps = 1;
        while (steps < min(kThreads, sentences - base)) steps *= 2;
#pragma unroll 4
        for (int t = start + threadIdx.x; t < start + total; t += kThreads) {
            // The last sentence that does not start behind t. Behind the last of all they start at the end.
            int owner = 0;
            for (int step = steps / 2; step > 0; step /= 2)
                if (placed.starts[owner + step] <= t) owner += step;
            context[t] = __ldg(plan.tokens + placed.shifts[owner] + t);
            loop.owner[t] = base + owner;
        }
        start += total;
        __syncthreads();
    }
}

// The part of a sequence that is taken: keys from the largest down, of equal ones from the right, as long as all their
// weights fit the room.
struct Cut {
    uint32_t least;  // all larger keys are taken
    int room;        // for those that are equal to it, which weigh `tied`
    int tied;

    // Whether a key is taken that is equal to `least`, given the weight of such from the left up to before it.
    __device__ bool takes_tied(int before) const { return tied - before <= room; }
};

// Finds it, where all do not fit. Keys are smaller than 2^31. The histogram is zero before and after.
template <class Key, class Weight>
__device__ Cut cut(Sums &sums, int count, int room, Key key_of, Weight weight_of) {
    Shared &shared = sums.shared;
    Cut cut{0, room, 0};
    int shift = 31;
    for (int pass = 0; pass < 3; ++pass) {
        const int bits = pass < 2 ? 11 : 9;
        shift -= bits;
        for (int base = 0; base < count; base += kThreads) {
            const int i = base + threadIdx.x;
            const uint32_t key = i < count ? key_of(i) : 0;
            const int weight = i < count && key >> shift >> bits == cut.least ? weight_of(i) : 0;
            if (weight) atomicAdd(&shared.histogram[key >> shift & ((1u << bits) - 1)], weight);
        }
        __syncthreads();
        // Bins from the largest down: two a thread.
        const int high = kBins - 1 - 2 * threadIdx.x;
        const int in_high = shared.histogram[high], in_low = shared.histogram[high - 1];
        shared.histogram[high] = shared.histogram[high - 1] = 0;
        int total;
        const int above = sums.before(in_high + in_low, total);
        if (above <= cut.room && above + in_high + in_low > cut.room) {
            const bool is_high = above + in_high > cut.room;
            shared.prefix = cut.least << bits | (is_high ? high : high - 1);
            shared.room = cut.room - above - (is_high ? 0 : in_high);
            shared.tied = is_high ? in_high : in_low;
        }
        __syncthreads();
        cut = {shared.prefix, shared.room, shared.tied};
        if (cut.room == 0) {
            // Nothing of this bin is taken.
            cut.least = ((cut.least + 1) << shift) - 1;
            break;
        }
    }
    return cut;
}

__global__ void __launch_bounds__(kThreads, 1) start_kernel(GleanerPlan plan, GleanerLoop loop) {
    __shared__ Shared shared;
    if (threadIdx.x == 0) *loop.state = GleanerState{};
    __syncthreads();
    Sums sums{shared};
    assemble(sums, plan, loop, 0, chunk_at(plan, 0), 0, 0, 0);
}

__global__ void __launch_bounds__(kThreads, 1) select_kernel(GleanerPlan plan, GleanerLoop loop) {
    __shared__ Shared shared;
    // Scores, behind them keys. Where the scores were come the sentences' best.
    extern __shared__ double dynamic[];
    // What earlier steps wrote is there: the logits' kernel has waited for it before the two behind it start.
    const GleanerState state = *loop.state;
    const int count = state.context_tokens, sentences = state.context_sentences;
    const bool ends = state.chunk + 1 == plan.chunks;
    Chunk next{};
    Place first_place{};  // of the sentence whose position is the thread's index
    int next_owner = -1;  // of the token there
    if (state.tokens > 0) {
        if (!ends) next = chunk_at(plan, state.chunk + 1);
        fetch(plan.sentence_offsets + next.first, next.sentences);
        fetch(plan.tokens + next.from, next.tokens);
        if (threadIdx.x < sentences) first_place = place(plan, loop.sentences[threadIdx.x]);
        if (threadIdx.x < count) next_owner = loop.owner[threadIdx.x];
        for (int bin = threadIdx.x; bin < kBins; bin += kThreads) shared.histogram[bin] = 0;
    }
    wait_for_previous();
    if (state.tokens == 0) return;
    Sums sums{shared};
    const double *scores = loop.scores;
    uint32_t *keys = reinterpret_cast<uint32_t *>(loop.phrase_scores), *best = loop.best;
    if (count <= kSharedTokens) {
#pragma unroll 4
        for (int c = threadIdx.x; c < count; c += kThreads) dynamic[c] = loop.scores[c];
        scores = dynamic;
        keys = reinterpret_cast<uint32_t *>(dynamic + min(loop.max_tokens, kSharedTokens));
        best = reinterpret_cast<uint32_t *>(dynamic);
        __syncthreads();
    }

    int invalid = 0;
    for (int c = threadIdx.x; c < count; c += kThreads) {
        const int from = max(0, c - plan.phrase_width / 2);
        const int to = min(count, c + (plan.phrase_width + 1) / 2);
        double sum = 0.;
#pragma unroll 8
        for (int t = from; t < to; ++t) sum += scores[t];
        const bool finite = isfinite(static_cast<float>(sum));
        invalid |= !finite;
        const float phrase_score = finite ? static_cast<float>(sum) : 0.f;
        loop.phrase_scores[c] = phrase_score;
        keys[c] = __float_as_uint(phrase_score);
    }
    invalid = __syncthreads_or(invalid);
    for (int i = threadIdx.x; i < sentences; i += kThreads) best[i] = 0;

    const bool all = plan.topk >= count;
    Cut tokens{0, 0, 0};
    if (!all) tokens = cut(sums, count, plan.topk, [&](int c) { return keys[c]; }, [](int) { return 1; });
    __syncthreads();
    for (int base = 0, tied_before = 0; base < count; base += kThreads) {
        const int c = base + threadIdx.x;
        const bool live = c < count;
        const uint32_t key = live ? keys[c] : 0;
        bool taken = all || key > tokens.least;
        if (tokens.room > 0) {
            const bool tied = live && key == tokens.least;
            int total;
            const int before = tied_before + sums.before(tied, total);
            taken |= tied && tokens.takes_tied(before);
            tied_before += total;
        }
        const int owner = next_owner;
        next_owner = c + kThreads < count ? loop.owner[c + kThreads] : -1;
        // Of a sentence's tokens in this warp, which are neighbours, the first gathers what the others have.
        uint32_t value = key | (taken ? kTaken : 0);
        for (int offset = 1; offset < 32; offset *= 2) {
            const uint32_t other = __shfl_down_sync(kAll, value, offset);
            if (__shfl_down_sync(kAll, owner, offset) == owner) value = max(value, other);
        }
        const int left = __shfl_up_sync(kAll, owner, 1);
        if (live && (threadIdx.x % 32 == 0 || left != owner)) atomicMax(best + owner, value);
    }
    __syncthreads();

    auto key_of = [&](int i) { return best[i] & ~kTaken; };
    auto place_at = [&](int i) { return i < kThreads ? first_place : place(plan, loop.sentences[i]); };
    auto length_of = [&](int i) { return best[i] & kTaken ? place_at(i).length : 0; };
    int own_tokens = 0;
    for (int i = threadIdx.x; i < sentences; i += kThreads) own_tokens += length_of(i);
    int kept_tokens = sums.total(own_tokens);
    const bool too_many = kept_tokens > plan.max_retained;
    Cut capacity{0, 0, 0};
    if (too_many) capacity = cut(sums, sentences, plan.max_retained, key_of, length_of);

    // Before the first sentence that goes, all keep their places, and their keys and values are those of the next step.
    int own_same_tokens = 0;
    int kept = 0, dropped = 0;
    own_tokens = 0;
    for (int base = 0, tied_before = 0; base < sentences; base += kThreads) {
        const int i = base + threadIdx.x;
        const bool selected = i < sentences && best[i] & kTaken;
        const Place own = selected ? place_at(i) : Place{};
        bool stays = selected && (!too_many || key_of(i) > capacity.least);
        if (capacity.room > 0) {
            const int tied = selected && key_of(i) == capacity.least ? own.length : 0;
            int total;
            const int before = tied_before + sums.before(tied, total);
            stays |= tied && capacity.takes_tied(before);
            tied_before += total;
        }
        // Both counts in one sum. It also lets all read of `sentences` before what stays is moved up.
        int totals;
        const int before = sums.before(stays | selected << 16, totals);
        if (stays) loop.sentences[kept + (before & 0xffff)] = own.sentence;
        if (stays) own_tokens += own.length;
        if (stays && kept + (before & 0xffff) == i) own_same_tokens += own.length;
        if (selected) {
            const size_t at = static_cast<size_t>(state.chunk) * loop.max_log + kept + dropped + (before >> 16);
            loop.log[at] = {own.sentence, stays ? 1u : 0u, __uint_as_float(key_of(i))};
        }
        kept += totals & 0xffff;
        dropped += (totals >> 16) - (totals & 0xffff);
    }
    if (too_many) kept_tokens = sums.total(own_tokens);
    const int same_tokens = plan.prefix_len + sums.total(own_same_tokens);
    if (threadIdx.x == 0) {
        loop.state->kept = kept;
        loop.state->kept_tokens = kept_tokens;
        loop.state->dropped_for_capacity += dropped;
        if (invalid) loop.state->error |= GLEANER_ERROR_NOT_FINITE;
        loop.state->tokens = loop.state->rows = loop.state->question_rows = 0;
        loop.step_log[state.chunk] = {state.tokens, count, kept + dropped, kept_tokens, state.first_row};
    }
    __syncthreads();
    if (!ends && !invalid) assemble(sums, plan, loop, state.chunk + 1, next, kept, kept_tokens, same_tokens);
}

}  // namespace

extern "C" int32_t gleaner_start(const GleanerLoop *loop, const GleanerPlan *plan, void *stream) {
    start_kernel<<<1, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(*plan, *loop);
    return cudaGetLastError();
}

extern "C" int32_t gleaner_select(const GleanerLoop *loop, const GleanerPlan *plan, void *stream) {
    const int in_shared = loop->max_tokens < kSharedTokens ? loop->max_tokens : kSharedTokens;
    const int shared_bytes = in_shared * static_cast<int>(sizeof(double) + sizeof(uint32_t));
    return launch_overlapping(select_kernel, 1, kThreads, shared_bytes, stream, *plan, *loop);
}
