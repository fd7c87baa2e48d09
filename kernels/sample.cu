// The next token of an answer, by one CTA: the likeliest, or a draw from the likeliest that together reach top_p.
//
// A draw needs sums in order of likelihood (equals in order of id), not the order itself. Weights are integers, so that
// sums do not depend on the order of addition. The token at which the running sum passes a target is found in two stages:
// a histogram of the weights over equal steps of the logit says in which step it lies; what lies there is searched bit by
// bit. The definition is src/sample.rs.
#include <math.h>

#include "common.cuh"
#include "kernels.h"

namespace {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kSteps = 2048, kList = 1024;
constexpr float kWeightOne = 1ull << 40;
constexpr float kSpan = 28.f;  // logits so many temperatures below the largest weigh nothing: e^-28 < 2^-40
constexpr int kIdBits = 24;

using Wide = unsigned long long;

// A token in the order of likelihood: greater is likelier, and of equals the one of smaller id.
__device__ Wide ordered(float logit, uint32_t id) {
    const uint32_t bits = __float_as_uint(logit + 0.f);  // -0 is 0
    const uint32_t key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<Wide>(key) << kIdBits | ((1u << kIdBits) - 1 - id);
}

__device__ uint32_t id_of(Wide token) { return (1u << kIdBits) - 1 - (token & ((1u << kIdBits) - 1)); }

template <class T, class Combine>
__device__ T block_reduce(T value, Combine combine) {
    __shared__ T parts[kWarps];
    __syncthreads();
    for (int offset = 16; offset > 0; offset /= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = value;
    __syncthreads();
    value = parts[threadIdx.x % 32];
    for (int offset = 16; offset > 0; offset /= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
    return value;
}

__device__ Wide block_sum(Wide value) {
    return block_reduce(value, [](Wide a, Wide b) { return a + b; });
}

__device__ Wide block_max(Wide value) {
    return block_reduce(value, [](Wide a, Wide b) { return a > b ? a : b; });
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
    sample_kernel(uint32_t *token, GleanerAnswer *answer, uint32_t *sent, const float *logits,
                  const GleanerSampling *sampling, int slots, int vocab_size) {
    __shared__ Shared shared;
    start_next();
    wait_for_previous();
    float largest = -INFINITY;
    int at = 0;
    bool valid = true;
    // A thread meets its logits in the order of their ids, so that of equals it keeps the first.
    auto look = [&](float logit, int id) {
        valid &= logit < INFINITY;  // false for NaN, too
        if (logit > largest) largest = logit, at = id;
    };
    const int fours = vocab_size / 4;
#pragma unroll 8
    for (int i = threadIdx.x; i < fours; i += kThreads) {
        const float4 four = reinterpret_cast<const float4 *>(logits)[i];
        look(four.x, i * 4), look(four.y, i * 4 + 1), look(four.z, i * 4 + 2), look(four.w, i * 4 + 3);
    }
    for (int id = fours * 4 + threadIdx.x; id < vocab_size; id += kThreads) look(logits[id], id);
    valid = __syncthreads_and(valid);
    // A thread that met nothing above minus infinity has no token to offer.
    const Wide best = block_max(largest > -INFINITY ? ordered(largest, at) : 0);
    valid &= best > 0;
    uint32_t chosen = id_of(best);
    if (valid && sampling->temperature > 0.f) {
        const Draw draw{logits, vocab_size, logits[chosen], sampling->temperature};
        chosen = draw_token(draw, sampling->top_p, uniform(sampling->seed, answer->tokens), shared);
    }
    __syncthreads();
    if (threadIdx.x > 0) return;
    const int index = answer->tokens;
    *token = valid ? chosen : 0;
    sent[index % slots] = valid ? chosen : GLEANER_NO_TOKEN;
    answer->position += 1;
    answer->tokens = index + 1;
}

}  // namespace

extern "C" int32_t gleaner_sample(uint32_t *token, GleanerAnswer *answer, uint32_t *sent, const float *logits,
                                  const GleanerSampling *sampling, int32_t slots, int32_t vocab_size, void *stream) {
    return launch_overlapping(sample_kernel, 1, kThreads, 0, stream, token, answer, sent, logits, sampling, slots,
                              vocab_size);
}
