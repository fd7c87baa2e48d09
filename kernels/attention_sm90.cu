// Causal grouped-query attention with an optional sliding window on Hopper, in the manner of FlashAttention-3.
//
// A CTA walks over pieces of work: 128 query rows of one head, 64 for each of two warpgroups that multiply. A third copies
// queries, keys and values in tiles of 128 rows. A warpgroup starts the scores of the next tile and the product of this
// one's probabilities with the values, and computes the next probabilities while the tensor cores work on that product.
// Tiles go from the diagonal to the left: all but the first are whole, or cut by the window alone.
//
// The pieces are dealt longest first, back and forth over the CTAs, which leaves all with the same number of tiles to
// within a few per cent. The order of sums depends on neither: a row sees the same tiles in the same order.
//
// Rows beyond the live count may hold anything: as queries they touch their own row alone, as keys they are masked, as
// values they are overwritten with zeros, for 0 times NaN would be NaN. They are never written.
#include "hopper.cuh"
#include "kernels.h"

namespace {

constexpr int kRows = GLEANER_ROW_BLOCK, kKeys = 128, kGroupRows = 64;
constexpr int kThreads = 384, kConsumers = 256, kConsumerWarps = 8;
constexpr int kBoxBytes = kRows * kBoxColumns * 2;
constexpr int kMaxStages = 4;
constexpr int kTurns = 2;  // the first of the barriers for turns; 1 is that of `sync_consumers`

template <int kHeadDim>
constexpr int kTileBytes = kHeadDim / kBoxColumns * kBoxBytes;
template <int kHeadDim>
constexpr int kStages = kHeadDim == 64 ? 4 : 2;
template <int kHeadDim>
constexpr int kSharedBytes = (1 + 2 * kStages<kHeadDim>)*kTileBytes<kHeadDim> + 1024;  // tiles start at a multiple of 1024

struct Args {
    bf16 *out;  // [rows - first_row, num_heads * head_dim]
    const int32_t *rows, *first_row;
    int num_heads, num_kv_heads;
    int window;        // keys a row may attend to, itself included; 0 for all
    float scale_log2;  // 1 / sqrt(head_dim), in base 2
};

// The tiles and barriers of a CTA, in shared memory.
struct Shared {
    uint32_t q, k, v;              // one tile, and rings of them
    uint32_t q_full, q_empty;      // barriers
    uint32_t k_full, k_empty, v_full, v_empty;  // the first of a ring's
};

// One piece of work: rows from m0 on of one head, and the tiles of keys that they see.
struct Piece {
    int head, m0, first_tile, last_tile;
};

// The pieces of a CTA. Those of one length are neighbours, so that heads that share keys and values read them together.
struct Schedule {
    int rows, first_row, num_heads, window, pieces;
    __device__ Schedule(const Args &args)
        : rows(*args.rows), first_row(start_of_rows(args.first_row)), num_heads(args.num_heads),
          window(args.window), pieces(divide_up(rows - first_row, kRows) * num_heads) {}
    __device__ int index(int round) const {
        const int place = round % 2 == 0 ? blockIdx.x : gridDim.x - 1 - blockIdx.x;
        return round * gridDim.x + place;
    }
    __device__ Piece piece(int index) const {
        const int m0 = first_row + (divide_up(rows - first_row, kRows) - 1 - index / num_heads) * kRows;
        const int first_key = window ? max(0, m0 + 1 - window) : 0;
        return {index % num_heads, m0, first_key / kKeys, (min(m0 + kRows, rows) - 1) / kKeys};
    }
};

template <int kHeadDim>
__device__ void produce(const CUtensorMap *map, const Args &args, const Schedule &schedule, const Shared &shared) {
    constexpr int kBytes = kTileBytes<kHeadDim>;
    Ring<kStages<kHeadDim>> at;
    uint32_t parity = 0;
    auto copy = [&](uint32_t to, int row, int head, uint32_t full, uint32_t empty, uint32_t phase) {
        barrier_wait(empty, phase ^ 1);
        barrier_expect(full, kBytes);
#pragma unroll
        for (int box = 0; box < kHeadDim / kBoxColumns; ++box)
            copy_box(to + box * kBoxBytes, map, row, head * kHeadDim + box * kBoxColumns, full);
    };
    for (int round = 0, index; (index = schedule.index(round)) < schedule.pieces; ++round, parity ^= 1) {
        const Piece piece = schedule.piece(index);
        const int k_head = args.num_heads + piece.head / (args.num_heads / args.num_kv_heads);
        const int v_head = k_head + args.num_kv_heads;
        copy(shared.q, piece.m0, piece.head, shared.q_full, shared.q_empty, parity);
        for (int tile = piece.last_tile; tile >= piece.first_tile; --tile, at.next()) {
            const int ring = at.stage * kBytes, barrier = at.stage * 8;
            copy(shared.k + ring, tile * kKeys, k_head, shared.k_full + barrier, shared.k_empty + barrier, at.parity);
            copy(shared.v + ring, tile * kKeys, v_head, shared.v_full + barrier, shared.v_empty + barrier, at.parity);
        }
    }
}

// Overwrites the rows of a tile from `first` on with zeros.
template <int kHeadDim>
__device__ void clear_rows(uint32_t tile, int first, int thread) {
    constexpr int kRowBytes = kBoxColumns * 2;
    for (int box = 0; box < kHeadDim / kBoxColumns; ++box)
        for (int at = first * kRowBytes + thread * 16; at < kBoxBytes; at += kConsumers * 16)
            asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(tile + box * kBoxBytes + at), "r"(0) : "memory");
    fence_for_engines();
}

// Waits for all threads of the two warpgroups that multiply.
__device__ void sync_consumers() { asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory"); }

template <int kHeadDim>
__device__ void consume(const Args &args, const Schedule &schedule, const Shared &shared) {
    constexpr int kBytes = kTileBytes<kHeadDim>;
    const int thread = threadIdx.x - (kThreads - kConsumers), group = thread / 128, warp = thread / 32;
    const int lane = threadIdx.x % 32;
    const bool leads = lane == 0;
    Ring<kStages<kHeadDim>> at;
    uint32_t parity = 0;
    float scores[kKeys / 2], out[kHeadDim / 2];
    uint32_t probabilities[kKeys / 4];

    // The warpgroups start their products in turns, the first one first, so that one works on probabilities while the other
    // multiplies. The last turn given is not taken, which a barrier may be left with.
    if (group == 1) give_turn(kTurns);
    auto start_scores = [&](int stage) {
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kHeadDim / 16; ++step) {
            const uint32_t box = step / 4 * kBoxBytes;
            const uint64_t in_box = step % 4 * kDescriptorStep;
            wgmma<kKeys>(scores, box_descriptor(shared.q + box + group * (kBoxBytes / 2)) + in_box,
                         box_descriptor(shared.k + stage * kBytes + box) + in_box, step);
        }
        wgmma_commit();
    };
    auto start_product = [&](int stage, bool first) {
        const uint64_t v = row_box_descriptor(shared.v + stage * kBytes, kBoxBytes);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kKeys / 16; ++step)
            wgmma_registers<kHeadDim>(out, probabilities + step * 4, v + step * kRowDescriptorStep, step > 0 || !first);
        wgmma_commit();
    };

    for (int round = 0, index; (index = schedule.index(round)) < schedule.pieces; ++round, parity ^= 1) {
        const Piece piece = schedule.piece(index);
        const int first_row = piece.m0 + group * kGroupRows, row = first_row + warp % 4 * 16 + lane / 4;
        float row_max[2] = {-INFINITY, -INFINITY}, row_sum[2] = {}, rescale[2];

        // From scores to probabilities; `rescale` is what sums so far are to be multiplied with.
        auto softmax = [&](int tile) {
            const int key0 = tile * kKeys;
            if (key0 + kKeys > first_row || (args.window && key0 < first_row + kGroupRows - args.window)) {
#pragma unroll
                for (int i = 0; i < kKeys / 2; ++i) {
                    const int key = key0 + i / 4 * 8 + lane % 4 * 2 + i % 2, of = row + i / 2 % 2 * 8;
                    if (key > of || (args.window && key <= of - args.window)) scores[i] = -INFINITY;
                }
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float maximum = row_max[half];
#pragma unroll
                for (int j = half * 2; j < kKeys / 2; j += 4) maximum = fmaxf(maximum, fmaxf(scores[j], scores[j + 1]));
                maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 1));
                maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 2));
                // A row sees its own key in its first tile, so that it has a maximum.
                const float base = maximum * args.scale_log2;
                rescale[half] = exp2_fast(row_max[half] * args.scale_log2 - base);
                row_max[half] = maximum;
                float sum = 0.f;
#pragma unroll
                for (int j = half * 2; j < kKeys / 2; j += 4) {
                    scores[j] = exp2_fast(scores[j] * args.scale_log2 - base);
                    scores[j + 1] = exp2_fast(scores[j + 1] * args.scale_log2 - base);
                    sum += scores[j] + scores[j + 1];
                }
                row_sum[half] = row_sum[half] * rescale[half] + sum;
            }
        };
        auto round_probabilities = [&] {
#pragma unroll
            for (int i = 0; i < kKeys / 4; ++i) probabilities[i] = pack(scores[2 * i], scores[2 * i + 1]);
        };

        barrier_wait(shared.q_full, parity);
        barrier_wait(shared.k_full + at.stage * 8, at.parity);
        start_scores(at.stage);
        wgmma_wait<0>();
        wgmma_results(scores);
        if (leads) barrier_arrive_here(shared.k_empty + at.stage * 8);
        if (const int dead = (piece.last_tile + 1) * kKeys - schedule.rows; dead > 0) {
            barrier_wait(shared.v_full + at.stage * 8, at.parity);
            clear_rows<kHeadDim>(shared.v + at.stage * kBytes, kKeys - dead, thread);
            sync_consumers();
        }
        softmax(piece.last_tile);
        round_probabilities();

        Ring<kStages<kHeadDim>> previous = at;
        at.next();
        for (int tile = piece.last_tile - 1; tile >= piece.first_tile; --tile) {
            barrier_wait(shared.k_full + at.stage * 8, at.parity);
            wait_for_turn(kTurns + group);
            start_scores(at.stage);
            barrier_wait(shared.v_full + previous.stage * 8, previous.parity);
            start_product(previous.stage, tile == piece.last_tile - 1);
            give_turn(kTurns + 1 - group);
            wgmma_wait<1>();
            wgmma_results(scores);
            if (leads) barrier_arrive_here(shared.k_empty + at.stage * 8);
            softmax(tile);
            wgmma_wait<0>();
            wgmma_results(out);
            if (leads) barrier_arrive_here(shared.v_empty + previous.stage * 8);
            round_probabilities();
#pragma unroll
            for (int i = 0; i < kHeadDim / 2; ++i) out[i] *= rescale[i / 2 % 2];
            previous = at;
            at.next();
        }
        if (leads) barrier_arrive_here(shared.q_empty);
        barrier_wait(shared.v_full + previous.stage * 8, previous.parity);
        start_product(previous.stage, piece.first_tile == piece.last_tile);
        wgmma_wait<0>();
        wgmma_results(out);
        if (leads) barrier_arrive_here(shared.v_empty + previous.stage * 8);

#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = row_sum[half];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            const float factor = 1.f / sum;
            const int of = row + half * 8;
            bf16 *to = args.out + (static_cast<size_t>(of - schedule.first_row) * args.num_heads + piece.head) * kHeadDim +
                       lane % 4 * 8;
#pragma unroll
            for (int j = 0; j < kHeadDim / 32; ++j) {
                uint32_t words[4];
#pragma unroll
                for (int w = 0; w < 4; ++w) {
                    const float *at = out + (j * 4 + w) * 4 + half * 2;
                    words[w] = pack(at[0] * factor, at[1] * factor);
                }
                const uint4 piece_of_row = transpose(words);
                if (of < schedule.rows) *reinterpret_cast<uint4 *>(to + j * 32) = piece_of_row;
            }
        }
    }
}

template <int kHeadDim>
__global__ void __launch_bounds__(kThreads, 1)
    attention_sm90_kernel(const __grid_constant__ CUtensorMap map, const Args args) {
    extern __shared__ unsigned char memory[];
    __shared__ uint64_t barriers[2 + 4 * kMaxStages];
    const uint32_t q_full = shared_address(barriers), first = q_full + 16;
    const uint32_t q = (shared_address(memory) + 1023) / 1024 * 1024, k = q + kTileBytes<kHeadDim>;
    const Shared shared{q, k, k + kStages<kHeadDim> * kTileBytes<kHeadDim>, q_full, q_full + 8, first,
                        first + kMaxStages * 8, first + kMaxStages * 16, first + kMaxStages * 24};
    if (threadIdx.x == 0) {
        prefetch_map(&map);
        barrier_init(shared.q_full, 1);
        barrier_init(shared.q_empty, kConsumerWarps);
        for (int stage = 0; stage < kStages<kHeadDim>; ++stage) {
            barrier_init(shared.k_full + stage * 8, 1);
            barrier_init(shared.k_empty + stage * 8, kConsumerWarps);
            barrier_init(shared.v_full + stage * 8, 1);
            barrier_init(shared.v_empty + stage * 8, kConsumerWarps);
        }
        barrier_init_fence();
    }
    __syncthreads();
    const Schedule schedule(args);
    // The roles are the two branches of one condition: what setmaxnreg asks for.
    if (threadIdx.x < kThreads - kConsumers) {
        give_registers<40>();
        if (threadIdx.x == 0) produce<kHeadDim>(&map, args, schedule, shared);
    } else {
        take_registers<232>();
        consume<kHeadDim>(args, schedule, shared);
    }
}

template <int kHeadDim>
int32_t launch(const void *qkv, const Args &args, int max_rows, void *stream) {
    const int columns = (args.num_heads + 2 * args.num_kv_heads) * kHeadDim;
    CUtensorMap map;
    if (const int32_t status = make_tensor_map(&map, static_cast<const bf16 *>(qkv), max_rows, columns, kRows)) return status;
    int multiprocessors;
    cudaError_t status = device_attribute(&multiprocessors, cudaDevAttrMultiProcessorCount);
    if (status == cudaSuccess)
        status = cudaFuncSetAttribute(attention_sm90_kernel<kHeadDim>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      kSharedBytes<kHeadDim>);
    if (status != cudaSuccess) return status;
    const int most_pieces = (max_rows + kRows - 1) / kRows * args.num_heads;
    const int grid = most_pieces < multiprocessors ? most_pieces : multiprocessors;
    attention_sm90_kernel<kHeadDim>
        <<<grid, kThreads, kSharedBytes<kHeadDim>, static_cast<cudaStream_t>(stream)>>>(map, args);
    return cudaGetLastError();
}

}  // namespace

extern "C" int32_t gleaner_attention_sm90(void *out, const void *qkv, const int32_t *rows, const int32_t *first_row,
                                          int32_t max_rows, int32_t num_heads, int32_t num_kv_heads, int32_t head_dim,
                                          int32_t window, void *stream) {
    const float log2_e = 1.4426950408889634f;
    const Args args{static_cast<bf16 *>(out), rows, first_row, num_heads, num_kv_heads, window,
                    log2_e / sqrtf(static_cast<float>(head_dim))};
    switch (head_dim) {
        case 64: return launch<64>(qkv, args, max_rows, stream);
        case 128: return launch<128>(qkv, args, max_rows, stream);
        default: return cudaErrorInvalidValue;
    }
}
