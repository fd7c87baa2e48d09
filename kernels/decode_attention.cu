// Attention of one new row over its cache. The keys are shared by CTAs, of which each serves up to 16 query heads of
// one group; the one that ends last joins the parts, in their order.
//
// A tile is 64 keys, 8 of them a warp's for the products with the queries; for the sum over the values a warp has an eighth
// of the dimensions. Both run on the tensor cores with the heads as rows. Probabilities go in as two bf16 numbers, the
// second for what the first leaves, which together hold 16 bits. The next tile's keys and values are on their way
// meanwhile: what this kernel takes is waiting for memory. That is also why tiles lie at fixed keys and are dealt out in
// turn: the first of a CTA can be asked for before it knows how many there are.
#include <math.h>

#include "common.cuh"
#include "kernels.h"

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kHeads = 16, kTile = 64;

struct Args {
    bf16 *out;     // [num_heads, head_dim]
    float *parts;  // [num_heads, splits, head_dim + 2]: sum of values, maximum, sum
    int32_t *done;
    const bf16 *qkv;
    const int32_t *position;
    int max_rows, splits, num_heads, num_kv_heads, window;
    float scale;
};

template <int kHeadDim>
struct Shared {
    uint4 values[kTile * kHeadDim / 8];        // rows of kHeadDim, their pieces of 16 bytes swizzled
    bf16 probabilities[2][kHeads * kTile];     // swizzled likewise
    float maxima[kWarps][kHeads], sums[kWarps][kHeads];
    float weights[kHeads][32];                 // of the parts
    bool last_part;
};

// Place of piece `piece` of a row of `pieces` of them.
__device__ int swizzled(int row, int piece, int pieces) { return row * pieces + (piece ^ row % 8); }

// Joins the parts of `heads` heads. All parts of a value are asked for before the first is used.
template <int kHeadDim>
__device__ void join(const Args &args, int first_head, int heads, Shared<kHeadDim> &shared) {
    constexpr int kStride = kHeadDim + 2, kBatch = 16;
    const int splits = args.splits, lane = threadIdx.x % 32;
    const float *parts = args.parts + static_cast<size_t>(first_head) * splits * kStride;
    for (int head = threadIdx.x / 32; head < heads; head += kWarps) {
        const float *of_head = parts + head * splits * kStride + kHeadDim;
        const float own = lane < splits ? __ldcg(of_head + lane * kStride) : -INFINITY;
        const float sum = lane < splits ? __ldcg(of_head + lane * kStride + 1) : 0.f;
        float maximum = own;
        for (int offset = 16; offset > 0; offset /= 2)
            maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, offset));
        const float weight = exp2f(own - maximum);
        float total = weight * sum;
        for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(0xffffffffu, total, offset);
        shared.weights[head][lane] = weight / total;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < heads * kHeadDim / 2; i += kThreads) {
        const int head = i / (kHeadDim / 2), pair = i % (kHeadDim / 2);
        const auto *of_pair = reinterpret_cast<const float2 *>(parts + head * splits * kStride) + pair;
        float2 value{};
        for (int first = 0; first < splits; first += kBatch) {
            float2 batch[kBatch];
#pragma unroll
            for (int s = 0; s < kBatch; ++s)
                batch[s] = __ldcg(of_pair + min(first + s, splits - 1) * (kStride / 2));
#pragma unroll
            for (int s = 0; s < kBatch; ++s) {
                // Beyond the last part weights are 0.
                const float weight = first + s < splits ? shared.weights[head][first + s] : 0.f;
                value.x += weight * batch[s].x;
                value.y += weight * batch[s].y;
            }
        }
        reinterpret_cast<uint32_t *>(args.out + first_head * kHeadDim)[i] = pack(value.x, value.y);
    }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads) decode_attention_kernel(const Args args) {
    constexpr int kPieces = kHeadDim / 8;            // of a row
    constexpr int kSteps = kHeadDim / 16;            // of a product over the dimensions
    constexpr int kColumns = kHeadDim / 8 / kWarps;  // groups of eight dimensions of a warp
    constexpr int kVectors = kHeadDim / 32;          // of 16 bytes, of a lane's quarter of a key or query
    __shared__ Shared<kHeadDim> shared;
    const int group = args.num_heads / args.num_kv_heads, split = blockIdx.x, kv_head = blockIdx.y;
    const int first_head = kv_head * group + blockIdx.z * kHeads, heads = min(kHeads, group - blockIdx.z * kHeads);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const size_t stride = static_cast<size_t>(args.num_heads + 2 * args.num_kv_heads) * kHeadDim;
    const bf16 *k = args.qkv + (args.num_heads + kv_head) * kHeadDim, *v = k + args.num_kv_heads * kHeadDim;

    start_next();
    wait_for_previous();
    // The order of the dimensions in a product is free as long as keys and queries agree: lane % 4 takes a quarter that
    // lies in one piece. Words 2 s and 2 s + 1 of it are what step s wants.
    const int quarter = lane % 4 * (kHeadDim / 4);
    uint32_t k_part[kSteps * 2] = {}, q_low[kSteps * 2] = {}, q_high[kSteps * 2] = {};
    uint4 v_part[kPieces / 4] = {};
    auto load_quarter = [&](uint32_t (&to)[kSteps * 2], const bf16 *row) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            const uint4 four = reinterpret_cast<const uint4 *>(row + quarter)[i];
            to[i * 4] = four.x, to[i * 4 + 1] = four.y, to[i * 4 + 2] = four.z, to[i * 4 + 3] = four.w;
        }
    };
    // Keys as the products want them; of the values, a row four threads.
    auto load = [&](int tile) {
        const int key = tile * kTile + warp * 8 + lane / 4, row = tile * kTile + threadIdx.x / 4;
        if (key < args.max_rows) load_quarter(k_part, k + key * stride);
        if (row >= args.max_rows) return;
#pragma unroll
        for (int i = 0; i < kPieces / 4; ++i)
            v_part[i] = reinterpret_cast<const uint4 *>(v + row * stride)[threadIdx.x % 4 + i * 4];
    };
    load(split);
    const int position = *args.position;
    const int oldest = args.window ? max(0, position + 1 - args.window) : 0;
    // The first tile of this CTA that holds a key.
    const int first_tile = split + max(0, oldest / kTile - split + args.splits - 1) / args.splits * args.splits;
    if (first_tile != split) load(first_tile);
    const bf16 *q = args.qkv + position * stride + first_head * kHeadDim;
    if (lane / 4 < heads) load_quarter(q_low, q + lane / 4 * kHeadDim);
    if (lane / 4 + 8 < heads) load_quarter(q_high, q + (lane / 4 + 8) * kHeadDim);

    // Of the heads lane / 4 and lane / 4 + 8.
    float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {}, values[kColumns][4] = {};
    for (int tile = first_tile; tile * kTile <= position; tile += args.splits) {
        float logits[4] = {};
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            const uint32_t a[4] = {q_low[s * 2], q_high[s * 2], q_low[s * 2 + 1], q_high[s * 2 + 1]};
            mma(logits, a, k_part[s * 2], k_part[s * 2 + 1]);
        }
        // Rows behind the last may hold anything, and 0 times infinity would not be 0.
        const bool live = tile * kTile + threadIdx.x / 4 <= position;
#pragma unroll
        for (int i = 0; i < kPieces / 4; ++i)
            shared.values[swizzled(threadIdx.x / 4, threadIdx.x % 4 + i * 4, kPieces)] = live ? v_part[i] : uint4{};
        load(tile + args.splits);

        const int key = tile * kTile + warp * 8 + lane % 4 * 2;
        float largest[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float &logit = logits[half * 2 + i];
                logit = key + i >= oldest && key + i <= position ? logit * args.scale : -INFINITY;
            }
            largest[half] = fmaxf(logits[half * 2], logits[half * 2 + 1]);
            for (int offset = 1; offset < 4; offset *= 2)
                largest[half] = fmaxf(largest[half], __shfl_xor_sync(0xffffffffu, largest[half], offset));
            if (lane % 4 == 0) shared.maxima[warp][lane / 4 + half * 8] = largest[half];
        }
        __syncthreads();

        float rescale[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int head = lane / 4 + half * 8;
            float next = maximum[half];
#pragma unroll
            for (int w = 0; w < kWarps; ++w) next = fmaxf(next, shared.maxima[w][head]);
            rescale[half] = exp2f(maximum[half] - next);
            maximum[half] = next;
            const float p0 = exp2f(logits[half * 2] - next), p1 = exp2f(logits[half * 2 + 1] - next);
            const uint32_t first = pack(p0, p1);
            const float2 rounded = unpack(first);
            const int at = swizzled(head, warp, kTile / 8) * 8 + lane % 4 * 2;
            *reinterpret_cast<uint32_t *>(shared.probabilities[0] + at) = first;
            *reinterpret_cast<uint32_t *>(shared.probabilities[1] + at) = pack(p0 - rounded.x, p1 - rounded.y);
            float part = p0 + p1;
            for (int offset = 1; offset < 4; offset *= 2) part += __shfl_xor_sync(0xffffffffu, part, offset);
            if (lane % 4 == 0) shared.sums[warp][head] = part;
        }
        __syncthreads();

#pragma unroll
        for (int half = 0; half < 2; ++half) {
            sum[half] *= rescale[half];
#pragma unroll
            for (int w = 0; w < kWarps; ++w) sum[half] += shared.sums[w][lane / 4 + half * 8];
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
                values[c][half * 2] *= rescale[half];
                values[c][half * 2 + 1] *= rescale[half];
            }
        }
#pragma unroll
        for (int s = 0; s < kTile / 16; ++s) {
            uint32_t p[2][4];
#pragma unroll
            for (int i = 0; i < 2; ++i)
                load_matrices(p[i], shared_address(shared.probabilities[i] +
                                                   swizzled(lane % 16, s * 2 + lane / 16, kTile / 8) * 8));
#pragma unroll
            for (int c = 0; c < kColumns; ++c) {
                // Keys 16 s to 16 s + 15 of eight dimensions, and the same again.
                uint32_t b[4];
                load_matrices_transposed(
                    b, shared_address(shared.values + swizzled(s * 16 + lane % 16, warp * kColumns + c, kPieces)));
                mma(values[c], p[0], b[0], b[1]);
                mma(values[c], p[1], b[0], b[1]);
            }
        }
        __syncthreads();
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int head = lane / 4 + half * 8;
        if (head >= heads) continue;
        float *part = args.parts + (static_cast<size_t>(first_head + head) * args.splits + split) * (kHeadDim + 2);
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
            *reinterpret_cast<float2 *>(part + (warp * kColumns + c) * 8 + lane % 4 * 2) = {values[c][half * 2],
                                                                                           values[c][half * 2 + 1]};
        if (warp == 0 && lane % 4 == 0) *reinterpret_cast<float2 *>(part + kHeadDim) = {maximum[half], sum[half]};
    }
    __syncthreads();
    int32_t *done = args.done + kv_head * gridDim.z + blockIdx.z;
    if (threadIdx.x == 0) {
        // Orders what the CTA wrote before the count, and the count before what it reads of others.
        int32_t before;
        asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(done) : "memory");
        shared.last_part = before == args.splits - 1;
    }
    __syncthreads();
    if (!shared.last_part) return;
    join<kHeadDim>(args, first_head, heads, shared);
    if (threadIdx.x == 0) *done = 0;
}

template <int kHeadDim>
int32_t launch(const Args &args, void *stream) {
    const int blocks = (args.num_heads / args.num_kv_heads + kHeads - 1) / kHeads;
    return launch_overlapping(decode_attention_kernel<kHeadDim>, dim3(args.splits, args.num_kv_heads, blocks), kThreads,
                              0, stream, args);
}

}  // namespace

extern "C" int32_t gleaner_decode_attention(void *out, float *parts, int32_t *done, const void *qkv,
                                            const int32_t *position, int32_t max_rows, int32_t splits,
                                            int32_t num_heads, int32_t num_kv_heads, int32_t head_dim, int32_t window,
                                            void *stream) {
    constexpr float kLog2E = 1.4426950408889634f;
    const Args args{static_cast<bf16 *>(out),
                    parts,
                    done,
                    static_cast<const bf16 *>(qkv),
                    position,
                    max_rows,
                    splits,
                    num_heads,
                    num_kv_heads,
                    window,
                    // The logarithm's base is two, so that the exponential is one instruction.
                    kLog2E / sqrtf(static_cast<float>(head_dim))};
    switch (head_dim) {
        case 64: return launch<64>(args, stream);
        case 128: return launch<128>(args, stream);
        default: return cudaErrorInvalidValue;
    }
}
