// Attention of one new row over its cache. The keys are cut into equal parts, a CTA a part and key head, which serves all
// query heads of its group; the CTA that ends last joins the parts, in their order.
//
// A tile is 128 keys: two threads make a key's products with all queries of the group, then a warp a head makes its
// probabilities and their sum over the values.
#include <math.h>

#include "common.cuh"
#include "kernels.h"

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kTile = 128;  // keys

struct Args {
    bf16 *out;        // [num_heads, head_dim]
    float *parts;     // [num_heads, splits, head_dim + 2]: sum of values, maximum, sum
    int32_t *done;    // [num_kv_heads]
    const bf16 *qkv;
    const int32_t *position;
    int splits, num_heads, num_kv_heads, window;
    float scale;
};

// Of a group of `heads`: queries and sums [heads, head_dim], logits [heads, kTile], maxima and sums [heads], values.
__host__ __device__ int shared_bytes(int heads, int head_dim) {
    return heads * (2 * head_dim + kTile + 2) * 4 + kTile * head_dim * 2;
}

// Joins the parts of a head: what a lane holds of all dimensions is written to `out`.
template <int kHeadDim>
__device__ void join(const Args &args, int head, int lane) {
    const float *parts = args.parts + static_cast<size_t>(head) * args.splits * (kHeadDim + 2);
    float maximum = -INFINITY;
    for (int s = lane; s < args.splits; s += 32) maximum = fmaxf(maximum, __ldcg(parts + s * (kHeadDim + 2) + kHeadDim));
    for (int offset = 16; offset > 0; offset /= 2)
        maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, offset));
    float total = 0.f, values[kHeadDim / 32] = {};
#pragma unroll 4
    for (int s = 0; s < args.splits; ++s) {
        const float *part = parts + s * (kHeadDim + 2);
        const float weight = exp2f(__ldcg(part + kHeadDim) - maximum);
        total += weight * __ldcg(part + kHeadDim + 1);
#pragma unroll
        for (int d = 0; d < kHeadDim / 32; ++d) values[d] += weight * __ldcg(part + d * 32 + lane);
    }
#pragma unroll
    for (int d = 0; d < kHeadDim / 32; ++d)
        args.out[head * kHeadDim + d * 32 + lane] = __float2bfloat16(values[d] / total);
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads) decode_attention_kernel(const Args args) {
    extern __shared__ __align__(16) unsigned char shared[];
    __shared__ bool last_part;
    const int group = args.num_heads / args.num_kv_heads, split = blockIdx.x, kv_head = blockIdx.y;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    auto *values = reinterpret_cast<uint4 *>(shared);  // [kTile, kHeadDim]
    auto *q = reinterpret_cast<float *>(values + kTile * kHeadDim / 8);
    float *sums = q + group * kHeadDim, *logits = sums + group * kHeadDim;
    float *maxima = logits + group * kTile, *totals = maxima + group;
    const size_t stride = static_cast<size_t>(args.num_heads + 2 * args.num_kv_heads) * kHeadDim;
    const bf16 *k = args.qkv + (args.num_heads + kv_head) * kHeadDim, *v = k + args.num_kv_heads * kHeadDim;

    start_next();
    wait_for_previous();
    const int position = *args.position;
    const int oldest = args.window ? max(0, position + 1 - args.window) : 0;
    const int share = (position + args.splits - oldest) / args.splits;  // keys of a part, rounded up
    const int begin = oldest + split * share, end = min(begin + share, position + 1);
    for (int i = threadIdx.x; i < group * kHeadDim; i += kThreads) {
        // The logarithm's base is two, so that the exponential is one instruction.
        q[i] = __bfloat162float(args.qkv[position * stride + kv_head * group * kHeadDim + i]) * args.scale;
        sums[i] = 0.f;
    }
    for (int i = threadIdx.x; i < group; i += kThreads) maxima[i] = -INFINITY, totals[i] = 0.f;
    __syncthreads();

    for (int tile = begin; tile < end; tile += kTile) {
        const int keys = min(kTile, end - tile);
        const int key = threadIdx.x / 2, half = threadIdx.x % 2;
        if (key < keys) {
            constexpr int kVectors = kHeadDim / 16;  // of half a row
            const auto *k_row = reinterpret_cast<const uint4 *>(k + (tile + key) * stride) + half * kVectors;
            const auto *v_row = reinterpret_cast<const uint4 *>(v + (tile + key) * stride) + half * kVectors;
            uint4 row[kVectors];
#pragma unroll
            for (int i = 0; i < kVectors; ++i) row[i] = k_row[i];
#pragma unroll
            for (int i = 0; i < kVectors; ++i) values[key * kHeadDim / 8 + half * kVectors + i] = v_row[i];
            for (int head = 0; head < group; ++head) {
                const auto *at = reinterpret_cast<const float4 *>(q + head * kHeadDim + half * kHeadDim / 2);
                float logit = 0.f;
#pragma unroll
                for (int i = 0; i < kVectors; ++i) {
                    const float4 low = at[i * 2], high = at[i * 2 + 1];
                    const float2 k0 = unpack(row[i].x), k1 = unpack(row[i].y), k2 = unpack(row[i].z),
                                 k3 = unpack(row[i].w);
                    logit += low.x * k0.x + low.y * k0.y + low.z * k1.x + low.w * k1.y + high.x * k2.x +
                             high.y * k2.y + high.z * k3.x + high.w * k3.y;
                }
                logit += __shfl_xor_sync(__activemask(), logit, 1);
                if (half == 0) logits[head * kTile + key] = logit;
            }
        }
        __syncthreads();

        for (int head = warp; head < group; head += kWarps) {
            float *probabilities = logits + head * kTile;
            float maximum = maxima[head];
            for (int i = lane; i < keys; i += 32) maximum = fmaxf(maximum, probabilities[i]);
            for (int offset = 16; offset > 0; offset /= 2)
                maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, offset));
            float total = 0.f;
            for (int i = lane; i < keys; i += 32) total += probabilities[i] = exp2f(probabilities[i] - maximum);
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
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last_part = atomicAdd(args.done + kv_head, 1) == args.splits - 1;
    __syncthreads();
    if (!last_part) return;
    __threadfence();
    for (int head = warp; head < group; head += kWarps) join<kHeadDim>(args, kv_head * group + head, lane);
    if (threadIdx.x == 0) args.done[kv_head] = 0;
}

template <int kHeadDim>
int32_t launch(const Args &args, void *stream) {
    return launch_overlapping(decode_attention_kernel<kHeadDim>, dim3(args.splits, args.num_kv_heads), kThreads,
                              shared_bytes(args.num_heads / args.num_kv_heads, kHeadDim), stream, args);
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
