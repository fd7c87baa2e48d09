// Attention of one new row over its cache: a CTA a head, a warp every eighth key, joined at the end in order of warp.
#include <math.h>

#include "common.cuh"
#include "kernels.h"

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads)
    decode_attention_kernel(bf16 *out, const bf16 *qkv, const int32_t *position, int num_heads, int num_kv_heads,
                            int window, float scale) {
    constexpr int kPairs = kHeadDim / 64;  // of dimensions, a lane
    __shared__ float maxima[kWarps], sums[kWarps], parts[kWarps][kHeadDim];
    const int head = blockIdx.x, kv_head = head / (num_heads / num_kv_heads);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const size_t stride = static_cast<size_t>(num_heads + 2 * num_kv_heads) * kHeadDim;
    const int last = *position;
    const bf16 *k = qkv + (num_heads + kv_head) * kHeadDim, *v = k + num_kv_heads * kHeadDim;
    auto pair = [&](const bf16 *row, int p) { return unpack(reinterpret_cast<const uint32_t *>(row)[p * 32 + lane]); };

    float2 q[kPairs], sum_v[kPairs] = {};
#pragma unroll
    for (int p = 0; p < kPairs; ++p) q[p] = pair(qkv + last * stride + head * kHeadDim, p);
    float maximum = -INFINITY, sum = 0.f;
    for (int key = (window ? max(0, last + 1 - window) : 0) + warp; key <= last; key += kWarps) {
        float logit = 0.f;
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
            const float2 at = pair(k + key * stride, p);
            logit += q[p].x * at.x + q[p].y * at.y;
        }
        for (int offset = 16; offset > 0; offset /= 2) logit += __shfl_xor_sync(0xffffffffu, logit, offset);
        logit *= scale;
        const float larger = fmaxf(maximum, logit);
        const float rescale = expf(maximum - larger), weight = expf(logit - larger);
        maximum = larger;
        sum = sum * rescale + weight;
#pragma unroll
        for (int p = 0; p < kPairs; ++p) {
            const float2 at = pair(v + key * stride, p);
            sum_v[p] = {sum_v[p].x * rescale + weight * at.x, sum_v[p].y * rescale + weight * at.y};
        }
    }
    if (lane == 0) {
        maxima[warp] = maximum;
        sums[warp] = sum;
    }
#pragma unroll
    for (int p = 0; p < kPairs; ++p) *reinterpret_cast<float2 *>(&parts[warp][(p * 32 + lane) * 2]) = sum_v[p];
    __syncthreads();

    if (threadIdx.x >= kHeadDim) return;
    float all = -INFINITY;
    for (const float part : maxima) all = fmaxf(all, part);
    float total = 0.f, value = 0.f;
    for (int w = 0; w < kWarps; ++w) {
        const float weight = expf(maxima[w] - all);
        total += weight * sums[w];
        value += weight * parts[w][threadIdx.x];
    }
    out[head * kHeadDim + threadIdx.x] = __float2bfloat16(value / total);
}

}  // namespace

extern "C" int32_t gleaner_decode_attention(void *out, const void *qkv, const int32_t *position, int32_t num_heads,
                                            int32_t num_kv_heads, int32_t head_dim, int32_t window, void *stream) {
    const float scale = 1.f / sqrtf(static_cast<float>(head_dim));
    auto *to = static_cast<bf16 *>(out);
    const auto *from = static_cast<const bf16 *>(qkv);
    auto *on = static_cast<cudaStream_t>(stream);
    switch (head_dim) {
        case 64:
            decode_attention_kernel<64>
                <<<num_heads, kThreads, 0, on>>>(to, from, position, num_heads, num_kv_heads, window, scale);
            break;
        case 128:
            decode_attention_kernel<128>
                <<<num_heads, kThreads, 0, on>>>(to, from, position, num_heads, num_kv_heads, window, scale);
            break;
        default: return cudaErrorInvalidValue;
    }
    return cudaGetLastError();
}
