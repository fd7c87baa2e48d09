// Attention of one new row over its cache. The keys are cut into equal parts, a CTA a part and key head, which serves all
// query heads of its group; the CTA that ends last joins the parts, in their order.
//
// A tile is 64 keys: four threads make a key's products with all queries of the group, then a warp a head makes its
// probabilities and their sum over the values. The next tile is on its way meanwhile: what this kernel takes is waiting for
// memory, not arithmetic.
#include <math.h>

#include "common.cuh"
#include "kernels.h"

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = 64;  // keys
constexpr int kPerKey = kThreads / kTile;  // threads

struct Args {
    bf16 *out;        // [num_heads, head_dim]
    float *parts;     // [num_heads, splits, head_dim + 2]: sum of values, maximum, sum
    int32_t *done;    // [num_kv_heads]
    const bf16 *qkv;
    const int32_t *position;
    int splits, num_heads, num_kv_heads, window;
    float scale;
};

static_assert(kTile == 64, "a lane has two keys' probabilities");

// Of a group of `heads`: queries and sums [heads, head_dim], maxima and sums [heads], values, and logits [heads, kTile],
// the place of which the weights of the parts take at the end.
int shared_bytes(int heads, int head_dim, int splits) {
    return heads * (2 * head_dim + (splits > kTile ? splits : kTile) + 2) * 4 + kTile * head_dim * 2;
}

// Joins the parts of a group's heads. weights: shared, [group, splits].
template <int kHeadDim>
__device__ void join(const Args &args, int first_head, int group, float *weights) {
    constexpr int kStride = kHeadDim + 2, kAhead = 16;
    const int splits = args.splits, lane = threadIdx.x % 32, outputs = group * kHeadDim;
    const float *parts = args.parts + static_cast<size_t>(first_head) * splits * kStride;
    auto value_at = [&](int output, int split) {
        return __ldcg(parts + (output / kHeadDim * splits + split) * kStride + output % kHeadDim);
    };
    // The first values come while the weights are made.
    float ahead[kAhead];
    if (threadIdx.x < outputs)
#pragma unroll
        for (int s = 0; s < kAhead; ++s) ahead[s] = s < splits ? value_at(threadIdx.x, s) : 0.f;
    for (int head = threadIdx.x / 32; head < group; head += kWarps) {
        const float *of_head = parts + head * splits * kStride + kHeadDim;
        const float own = lane < splits ? __ldcg(of_head + lane * kStride) : -INFINITY;
        const float sum = lane < splits ? __ldcg(of_head + lane * kStride + 1) : 0.f;
        float maximum = own;
        for (int offset = 16; offset > 0; offset /= 2)
            maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, offset));
        const float weight = exp2f(own - maximum);
        float total = weight * sum;
        for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
        if (lane < splits) weights[head * splits + lane] = weight / total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < outputs; i += kThreads) {
        const float *of_output = weights + i / kHeadDim * splits;
        float value = 0.f;
#pragma unroll
        for (int s = 0; s < kAhead; ++s) {
            if (s >= splits) break;
            value += of_output[s] * (i < kThreads ? ahead[s] : value_at(i, s));
        }
        for (int s = kAhead; s < splits; ++s) value += of_output[s] * value_at(i, s);
        args.out[first_head * kHeadDim + i] = __float2bfloat16(value);
    }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads) decode_attention_kernel(const Args args) {
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ bool last_part;
    const int group = args.num_heads / args.num_kv_heads, split = blockIdx.x, kv_head = blockIdx.y;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    auto *values = reinterpret_cast<uint4 *>(shared);  // [kTile, kHeadDim]
    auto *q = reinterpret_cast<float *>(values + kTile * kHeadDim / 8);
    float *sums = q + group * kHeadDim, *maxima = sums + group * kHeadDim, *totals = maxima + group;
    float *logits = totals + group;
    const size_t stride = static_cast<size_t>(args.num_heads + 2 * args.num_kv_heads) * kHeadDim;
    const bf16 *k = args.qkv + (args.num_heads + kv_head) * kHeadDim, *v = k + args.num_kv_heads * kHeadDim;

    start_next();
    wait_for_previous();
    const int position = *args.position;
    const int oldest = args.window ? max(0, position + 1 - args.window) : 0;
    const int share = (position + args.splits - oldest) / args.splits;  // keys of a part, rounded up
    const int begin = oldest + split * share, end = min(begin + share, position + 1);
    const int key = threadIdx.x / kPerKey, part = threadIdx.x % kPerKey;
    constexpr int kVectors = kHeadDim / 8 / kPerKey;  // of a thread
    uint4 k_part[kVectors] = {}, v_part[kVectors] = {};
    auto load = [&](int tile) {
        if (tile + key >= end) return;
        const size_t at = (tile + key) * stride + part * kVectors * 8;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            k_part[i] = reinterpret_cast<const uint4 *>(k + at)[i];
            v_part[i] = reinterpret_cast<const uint4 *>(v + at)[i];
        }
    };
    load(begin);
    for (int i = threadIdx.x; i < group * kHeadDim; i += kThreads) {
        // The logarithm's base is two, so that the exponential is one instruction.
        q[i] = __bfloat162float(args.qkv[position * stride + kv_head * group * kHeadDim + i]) * args.scale;
        sums[i] = 0.f;
    }
    for (int i = threadIdx.x; i < group; i += kThreads) maxima[i] = -INFINITY, totals[i] = 0.f;
    __syncthreads();

    for (int tile = begin; tile < end; tile += kTile) {
        const int keys = min(kTile, end - tile);
        for (int head = 0; head < group; ++head) {
            const auto *at = reinterpret_cast<const float4 *>(q + head * kHeadDim) + part * kVectors * 2;
            float logit = 0.f;
#pragma unroll
            for (int i = 0; i < kVectors; ++i) {
                const float4 low = at[i * 2], high = at[i * 2 + 1];
                const float2 k0 = unpack(k_part[i].x), k1 = unpack(k_part[i].y), k2 = unpack(k_part[i].z),
                             k3 = unpack(k_part[i].w);
                logit += low.x * k0.x + low.y * k0.y + low.z * k1.x + low.w * k1.y + high.x * k2.x + high.y * k2.y +
                         high.z * k3.x + high.w * k3.y;
            }
#pragma unroll
            for (int offset = 1; offset < kPerKey; offset *= 2) logit += __shfl_xor_sync(0xffffffffu, logit, offset);
            if (part == 0) logits[head * kTile + key] = logit;
        }
#pragma unroll
        for (int i = 0; i < kVectors; ++i) values[(key * kPerKey + part) * kVectors + i] = v_part[i];
        load(tile + kTile);
        __syncthreads();

        for (int head = warp; head < group; head += kWarps) {
            float *probabilities = logits + head * kTile;
            const float low = lane < keys ? probabilities[lane] : -INFINITY;
            const float high = lane + 32 < keys ? probabilities[lane + 32] : -INFINITY;
            float maximum = fmaxf(maxima[head], fmaxf(low, high));
            for (int offset = 16; offset > 0; offset /= 2)
                maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, offset));
            probabilities[lane] = exp2f(low - maximum);
            probabilities[lane + 32] = exp2f(high - maximum);
            float total = probabilities[lane] + probabilities[lane + 32];
            for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
            const float rescale = exp2f(maxima[head] - maximum);
            __syncwarp();
            if (lane == 0) {
                maxima[head] = maximum;
                totals[head] = totals[head] * rescale + total;
            }
            float2 sum[kHeadDim / 64] = {};
#pragma unroll 8
            for (int i = 0; i < keys; ++i) {
                const float probability = probabilities[i];
#pragma unroll
                for (int p = 0; p < kHeadDim / 64; ++p) {
                    const float2 value =
                        unpack(reinterpret_cast<const uint32_t *>(values)[i * kHeadDim / 2 + p * 32 + lane]);
                    sum[p].x += probability * value.x;
                    sum[p].y += probability * value.y;
                }
            }
#pragma unroll
            for (int p = 0; p < kHeadDim / 64; ++p) {
                auto *at = reinterpret_cast<float2 *>(sums + head * kHeadDim) + p * 32 + lane;
                *at = {at->x * rescale + sum[p].x, at->y * rescale + sum[p].y};
            }
        }
        __syncthreads();
    }

    for (int i = threadIdx.x; i < group * (kHeadDim + 2); i += kThreads) {
        const int head = i / (kHeadDim + 2), d = i % (kHeadDim + 2);
        const float value = d < kHeadDim ? sums[head * kHeadDim + d] : d == kHeadDim ? maxima[head] : totals[head];
        args.parts[(static_cast<size_t>(kv_head * group + head) * args.splits + split) * (kHeadDim + 2) + d] = value;
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        // Orders what the CTA wrote before the count, and the count before what it reads of others.
        __threadfence();
        last_part = atomicAdd(args.done + kv_head, 1) == args.splits - 1;
        __threadfence();
    }
    __syncthreads();
    if (!last_part) return;
    join<kHeadDim>(args, kv_head * group, group, logits);
    if (threadIdx.x == 0) args.done[kv_head] = 0;
}

template <int kHeadDim>
int32_t launch(const Args &args, void *stream) {
    return launch_overlapping(decode_attention_kernel<kHeadDim>, dim3(args.splits, args.num_kv_heads), kThreads,
                              shared_bytes(args.num_heads / args.num_kv_heads, kHeadDim, args.splits), stream, args);
}

}  // namespace

extern "C" int32_t gleaner_decode_attention(void *out, float *parts, int32_t *done, const void *qkv,
                                            const int32_t *position, int32_t splits, int32_t num_heads,
                                            int32_t num_kv_heads, int32_t head_dim, int32_t window, void *stream) {
    constexpr float kLog2E = 1.4426950408889634f;
    const Args args{static_cast<bf16 *>(out),
                    parts,
                    done,
                    static_cast<const bf16 *>(qkv),
                    position,
                    splits,
                    num_heads,
                    num_kv_heads,
                    window,
                    kLog2E / sqrtf(static_cast<float>(head_dim))};
    switch (head_dim) {
        case 64: return launch<64>(args, stream);
        case 128: return launch<128>(args, stream);
        default: return cudaErrorInvalidValue;
    }
}
