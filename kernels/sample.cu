// The next token of an answer, by one CTA: the likeliest, which is known (gemv.cu), or a draw from the likeliest that
// together reach top_p.
//
// A draw needs sums in order of likelihood (equals in order of id), not the order itself. Weights are integers, so that
// sums do not depend on the order of addition. The token at which the running sum passes a target is found in two stages:
// a histogram of the weights over equal steps of the logit says in which step it lies; what lies there is searched bit by
// bit. The definition is src/sample.rs.
#include <float.h>
#include <math.h>

#include "common.cuh"
#include "kernels.h"
#include "token_order.cuh"

namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kSteps = 2048, kList = 1024;
constexpr float kWeightOne = 1ull << 40;
constexpr float kSpan = 28.f;  // logits so many temperatures below the largest weigh nothing: e^-28 < 2^-40

__device__ Wide block_sum(Wide value) {
    __shared__ Wide parts[kWarps];
    __syncthreads();
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    value = parts[threadIdx.x % 32];
    for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
    return value;
}

struct Draw {
    const float *logits;
    int vocab_size;
    float maximum, temperature;

    __device__ float depth(float logit) const { return (maximum - logit) / temperature; }
    __device__ Wide weight(float logit) const { return static_cast<Wide>(expf(-depth(logit)) * kWeightOne); }
    __device__ int step(float logit) const {
        return static_cast<int>(fminf(depth(logit) * (kSteps / kSpan), static_cast<float>(kSteps - 1)));
    }
};

struct Found {
    Wide token;
    Wide through;  // weight of it and of all that are likelier
};

struct Shared {
    Wide histogram[kSteps];
    Wide tokens[kList], weights[kList];
    Wide before;
    int step, listed;
};

// The token at which the sum of weights passes `target`, which is below their total.
__device__ Found find(const Draw &draw, Wide target, Shared &shared) {
    // The step: a warp's worth of neighbours each thread, then a scan over threads.
    constexpr int kEach = kSteps / kThreads;
    __shared__ Wide warp_sums[kWarps];
    const int first = threadIdx.x * kEach, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    Wide own = 0;
    for (int i = 0; i < kEach; ++i) own += shared.histogram[first + i];
    Wide through = own;
    for (int offset = 1; offset < 32; offset *= 2) {
        const Wide lower = __shfl_up_sync(0xffffffffu, through, offset);
        if (lane >= offset) through += lower;
    }
    __syncthreads();
    if (lane == 31) warp_sums[warp] = through;
    if (threadIdx.x == 0) shared.listed = 0;
    __syncthreads();
    for (int w = 0; w < warp; ++w) through += warp_sums[w];
    Wide before = through - own;
    if (before <= target && target < through) {
        for (int i = 0; i < kEach; ++i) {
            const Wide next = before + shared.histogram[first + i];
            if (target < next) {
                shared.before = before;
                shared.step = first + i;
                break;
            }
            before = next;
        }
    }
    __syncthreads();

    // Its tokens: a list, if they fit.
    const int step = shared.step;
    for (int id = threadIdx.x; id < draw.vocab_size; id += kThreads) {
        const float logit = draw.logits[id];
        if (draw.step(logit) != step) continue;
        const int at = atomicAdd(&shared.listed, 1);
        if (at >= kList) continue;
        shared.tokens[at] = ordered(logit, id);
        shared.weights[at] = draw.weight(logit);
    }
    __syncthreads();
    const int listed = shared.listed;
    const Wide rest = target - shared.before;
    auto weight_from = [&](Wide token) {
        Wide sum = 0;
        if (listed <= kList) {
            for (int i = threadIdx.x; i < listed; i += kThreads)
                if (shared.tokens[i] >= token) sum += shared.weights[i];
        } else {
            for (int id = threadIdx.x; id < draw.vocab_size; id += kThreads) {
                const float logit = draw.logits[id];
                if (draw.step(logit) == step && ordered(logit, id) >= token) sum += draw.weight(logit);
            }
        }
        return block_sum(sum);
    };
    // The likeliest down to the token sought, and no more, weigh more than the rest.
    Wide token = 0;
    for (int bit = 31 + kIdBits; bit >= 0; --bit)
        if (weight_from(token | 1ull << bit) > rest) token |= 1ull << bit;
    return {token, shared.before + weight_from(token)};
}

__device__ Wide mix(Wide z) {
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
}

// In [0, 1): depends on nothing but the seed and the index.
__device__ double uniform(Wide seed, Wide index) {
    return (mix(mix(seed + 0x9e3779b97f4a7c15ull) + index) >> 11) * 0x1p-53;
}

__device__ uint32_t draw_token(Draw draw, float top_p, double position, Shared &shared) {
    for (int i = threadIdx.x; i < kSteps; i += kThreads) shared.histogram[i] = 0;
    __syncthreads();
    for (int id = threadIdx.x; id < draw.vocab_size; id += kThreads) {
        const float logit = draw.logits[id];
        if (const Wide weight = draw.weight(logit)) atomicAdd(&shared.histogram[draw.step(logit)], weight);
    }
    __syncthreads();
    Wide own = 0;
    for (int i = threadIdx.x; i < kSteps; i += kThreads) own += shared.histogram[i];
    Wide total = block_sum(own);
    if (top_p < 1.f) {
        // The first token at which the sum reaches the share: at which it passes what is just below it.
        const Wide share = static_cast<Wide>(ceil(static_cast<double>(top_p) * static_cast<double>(total)));
        total = find(draw, share > 0 ? min(share, total) - 1 : 0, shared).through;
        __syncthreads();
    }
    const Wide target = static_cast<Wide>(position * static_cast<double>(total));
    return id_of(find(draw, min(target, total - 1), shared).token);
}

__global__ void __launch_bounds__(kThreads, 1)
    sample_kernel(float4 *x, GleanerAnswer *answer, uint32_t *sent, uint64_t *best, const float *logits,
                  const GleanerSampling *sampling, const uint4 *embedding, int slots, int vocab_size, int vectors) {
    __shared__ Shared shared;
    start_next();
    wait_for_previous();
    const Wide likeliest = *best;
    const int index = answer->tokens;
    const bool valid = likeliest < ordered(INFINITY, (1u << kIdBits) - 1) && likeliest >= ordered(-FLT_MAX, 0);
    uint32_t chosen = valid ? id_of(likeliest) : 0;
    if (valid && sampling->temperature > 0.f) {
        const Draw draw{logits, vocab_size, logits[chosen], sampling->temperature};
        chosen = draw_token(draw, sampling->top_p, uniform(sampling->seed, index), shared);
    }
    for (int i = threadIdx.x; i < vectors; i += kThreads) {
        const uint4 row = embedding[static_cast<size_t>(chosen) * vectors + i];
        const float2 a = unpack(row.x), b = unpack(row.y), c = unpack(row.z), d = unpack(row.w);
        x[i * 2] = {a.x, a.y, b.x, b.y};
        x[i * 2 + 1] = {c.x, c.y, d.x, d.y};
    }
    __syncthreads();
    if (threadIdx.x > 0) return;
    sent[index % slots] = valid ? chosen : GLEANER_NO_TOKEN;
    *best = 0;
    answer->position += 1;
    answer->tokens = index + 1;
}

}  // namespace

extern "C" int32_t gleaner_sample(float *x, GleanerAnswer *answer, uint32_t *sent, uint64_t *best, const float *logits,
                                  const GleanerSampling *sampling, const void *embedding, int32_t slots,
                                  int32_t vocab_size, int32_t hidden_size, void *stream) {
    return launch_overlapping(sample_kernel, 1, kThreads, 0, stream, reinterpret_cast<float4 *>(x), answer, sent, best,
                              logits, sampling, static_cast<const uint4 *>(embedding), slots, vocab_size,
                              hidden_size / 8);
}
