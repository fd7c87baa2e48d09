// Causal grouped-query attention with an optional sliding window on Hopper, in the manner of FlashAttention-3.
//
// A CTA walks over pieces of work: the query rows of one head, 64 for each of two or three warpgroups that multiply. One more
// copies queries, and keys and values in tiles of 128 rows. A warpgroup starts the scores of the next tile and the product
// of this one's probabilities with the values, and computes the next probabilities while the tensor cores work on that product.
// Tiles go from the diagonal to the left: all but the first are whole, or cut by the window alone.
//
// Exponentials are taken against the maximum of a row's first tile: tensor cores and other instructions slow each other down,
// and maxima of all tiles would be a fifth of those. Probabilities far above 1 are as exact as those below, for bf16 has the
// exponents of fp32. Where a row's sums come near the end of these, because a far tile has a far larger score, that tile is
// computed again and the row takes its maximum. Whether it does depends on the row's own scores alone.
//
// The pieces are dealt to the CTAs by their lengths, so that all have nearly the same number of tiles. The order of sums does
// not depend on that, nor on the number of warpgroups: a row sees the same tiles in the same order.
//
// Blocks of 64 rows start at multiples of 64 whichever row is the first, for a row must see its own key in its first tile, and
// the same tiles always. Those before the first are computed, for their block is, and not written.
//
// Rows beyond the live count may hold anything: as queries they touch their own row alone, as keys they are masked, as
// values they are overwritten with zeros, for 0 times NaN would be NaN. They are never written.
#include "hopper.cuh"
#include "kernels.h"

namespace {

constexpr int kKeys = 128, kGroupRows = 64, kBoxRows = 64;
constexpr int kMaxGroups = 3, kMaxStages = 4;
constexpr int kTurns = 2;  // the first of the barriers for turns; 1 is that of all warpgroups that multiply
constexpr int kGroupBarriers = kTurns + kMaxGroups;  // the first of those that are each of one warpgroup
constexpr float kMostSum = 0x1p60f;  // of a lane's probabilities of a tile

// What a CTA of this many warpgroups that multiply works with.
template <int kHeadDim, int kGroups>
struct Shape {
    static constexpr int kRows = kGroups * kGroupRows;
    static constexpr int kConsumers = kGroups * 128, kThreads = kConsumers + 128;
    static constexpr int kStages = kHeadDim == 64 ? 4 : 2;
    static constexpr int kRowBytes = kHeadDim * 2, kTileBytes = kKeys * kRowBytes;
    // Tiles start at multiples of 1024.
    static constexpr int kSharedBytes = kRows * kRowBytes + 2 * kStages * kTileBytes + 1024;
    static constexpr int kRegisters = kGroups == 2 ? 232 : 160, kCopyRegisters = kGroups == 2 ? 40 : 32;
};

struct Args {
    bf16 *out;  // [rows - first_row, num_heads * head_dim]
    const int32_t *rows, *first_row;
    int num_heads, num_kv_heads;
    int window;        // keys a row may attend to, itself included; 0 for all
    float scale_log2;  // 1 / sqrt(head_dim), in base 2
};

// The tiles and barriers of a CTA, in shared memory.
struct Shared {
    uint32_t q, k, v;                           // the queries of a piece, and rings of tiles
    uint32_t q_full, q_empty;                   // barriers
    uint32_t k_full, k_empty, v_full, v_empty;  // the first of a ring's
    uint32_t over;                              // two words a warpgroup: whether a sum of a tile is above kMostSum
};

// One piece of work: rows from m0 on of one head, and the tiles of keys that they see.
struct Piece {
    int head, m0, first_tile, last_tile;
};

// The pieces of a CTA, longest first. Those of one length are neighbours, so that heads that share keys and values read them
// together.
//
// They are dealt back and forth over the CTAs. Where that leaves a third round that few CTAs take part in, they are dealt in
// two parts: n pieces whose lengths fall evenly to none make equal shares for g CTAs if the first n (1 - n / 4g) CTAs take
// two pieces each, the longest with the shortest of this part, and the others share the rest. It is a few CTAs less, for
// each piece has a start and an end too.
template <int kRows>
struct Schedule {
    const Args &args;
    int rows, pieces;
    __device__ Schedule(const Args &args)
        : args(args), rows(*args.rows), pieces(divide_up(rows - first_block(), kRows) * args.num_heads) {}
    // Loaded each time: a register more would not be there.
    __device__ int first_row() const { return start_of_rows(args.first_row); }
    // The first row of its block.
    __device__ int first_block() const { return first_row() & -kGroupRows; }
    __device__ int index(int round) const {
        const int cta = blockIdx.x, grid = gridDim.x;
        const bool in_parts = args.window == 0 && first_block() == 0 && pieces > 2 * grid && 5 * pieces <= 14 * grid;
        const int pairs = in_parts ? pieces * (4 * grid - pieces) / (4 * grid) * 47 / 50 : 0;
        if (cta < pairs) return round == 0 ? cta : round == 1 ? 2 * pairs - 1 - cta : pieces;
        return 2 * pairs + round * (grid - pairs) + (round % 2 == 0 ? cta - pairs : grid - 1 - cta);
    }
    __device__ Piece piece(int index) const {
        const int m0 = first_block() + (pieces - 1 - index) / args.num_heads * kRows;
        const int first_key = args.window ? max(0, m0 + 1 - args.window) : 0;
        return {index % args.num_heads, m0, first_key / kKeys, (min(m0 + kRows, rows) - 1) / kKeys};
    }
};

template <int kHeadDim, int kGroups>
__device__ void produce(const CUtensorMap *map, const Args &args, const Shared &shared) {
    using S = Shape<kHeadDim, kGroups>;
    const Schedule<S::kRows> schedule(args);
    Ring<S::kStages> at;
    uint32_t parity = 0;
    auto copy = [&](uint32_t to, int rows, int row, int head, uint32_t full, uint32_t empty, uint32_t phase) {
        barrier_wait(empty, phase ^ 1);
        barrier_expect(full, rows * S::kRowBytes);
        for (int column = 0; column < kHeadDim; column += kBoxColumns)
            for (int box = 0; box < rows; box += kBoxRows)
                copy_box(to + (column * rows + box * kBoxColumns) * 2, map, row + box, head * kHeadDim + column, full);
    };
    for (int round = 0, index; (index = schedule.index(round)) < schedule.pieces; ++round, parity ^= 1) {
        const Piece piece = schedule.piece(index);
        const int k_head = args.num_heads + piece.head / (args.num_heads / args.num_kv_heads);
        const int v_head = k_head + args.num_kv_heads;
        copy(shared.q, S::kRows, piece.m0, piece.head, shared.q_full, shared.q_empty, parity);
        for (int tile = piece.last_tile; tile >= piece.first_tile; --tile, at.next()) {
            const int ring = at.stage * S::kTileBytes, barrier = at.stage * 8, row = tile * kKeys;
            copy(shared.k + ring, kKeys, row, k_head, shared.k_full + barrier, shared.k_empty + barrier, at.parity);
            copy(shared.v + ring, kKeys, row, v_head, shared.v_full + barrier, shared.v_empty + barrier, at.parity);
        }
    }
}

// Overwrites the rows of a tile from `first` on with zeros.
template <int kHeadDim, int kConsumers>
__device__ void clear_rows(uint32_t tile, int first, int thread) {
    constexpr int kBoxRowBytes = kBoxColumns * 2, kColumnBytes = kKeys * kBoxRowBytes;
    for (int box = 0; box < kHeadDim / kBoxColumns; ++box)
        for (int at = first * kBoxRowBytes + thread * 16; at < kColumnBytes; at += kConsumers * 16)
            asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(tile + box * kColumnBytes + at), "r"(0) : "memory");
    fence_for_engines();
}

// Waits for so many threads at a named barrier.
template <int kThreads>
__device__ void sync_threads(int barrier) {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

__device__ void store_word(uint32_t to, int value) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(value) : "memory"); }

__device__ int load_word(uint32_t from) {
    int value;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(from) : "memory");
    return value;
}

template <int kHeadDim, int kGroups>
__device__ void consume(const Args &args, const Shared &shared) {
    using S = Shape<kHeadDim, kGroups>;
    constexpr int kColumnBytes = kKeys * kBoxColumns * 2;
    const Schedule<S::kRows> schedule(args);
    // The shuffle tells the compiler that a warp's lanes agree on the group, and so on all loops.
    const int thread = threadIdx.x - 128, group = __shfl_sync(0xffffffffu, thread / 128, 0), warp = thread / 32;
    const int lane = threadIdx.x % 32;
    const bool leads = lane == 0;
    Ring<S::kStages> at;
    uint32_t parity = 0;
    float scores[kKeys / 2], out[kHeadDim / 2];
    uint32_t probabilities[kKeys / 4];

    // The warpgroups start their products in turns, the first one first, so that others work on probabilities while one
    // multiplies. The last turn given is not taken, which a barrier may be left with.
    if (group == kGroups - 1) give_turn(kTurns);
    auto take_turn = [&] { wait_for_turn(kTurns + group); };
    auto pass_turn = [&] { give_turn(kTurns + (group + 1) % kGroups); };
    auto start_scores = [&](int stage) {
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kHeadDim / 16; ++step) {
            const uint64_t in_box = step % 4 * kDescriptorStep;
            const uint32_t q = shared.q + (step / 4 * S::kRows + group * kGroupRows) * (kBoxColumns * 2);
            const uint32_t k = shared.k + stage * S::kTileBytes + step / 4 * kColumnBytes;
            wgmma<kKeys>(scores, box_descriptor(q) + in_box, box_descriptor(k) + in_box, step);
        }
        wgmma_commit();
    };
    auto start_product = [&](int stage, bool first) {
        const uint64_t v = row_box_descriptor(shared.v + stage * S::kTileBytes, kColumnBytes);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kKeys / 16; ++step)
            wgmma_registers<kHeadDim>(out, probabilities + step * 4, v + step * kRowDescriptorStep, step > 0 || !first);
        wgmma_commit();
    };
    auto finish_scores = [&] {
        wgmma_wait<0>();
        wgmma_results(scores);
    };
    // Two words take turns, for a warp may be a tile ahead of one that still has to read.
    auto over_word = [&](int tile) { return shared.over + group * 8 + tile % 2 * 4; };
    auto wait_for = [&](uint32_t full, const Ring<S::kStages> &at) { barrier_wait(full + at.stage * 8, at.parity); };
    auto release = [&](uint32_t empty, const Ring<S::kStages> &at) {
        if (leads) barrier_arrive_here(empty + at.stage * 8);
    };

    for (int round = 0, index; (index = schedule.index(round)) < schedule.pieces; ++round, parity ^= 1) {
        const Piece piece = schedule.piece(index);
        const int first_row = piece.m0 + group * kGroupRows, row = first_row + warp % 4 * 16 + lane / 4;
        const int last_tile = min(piece.last_tile, (first_row + kGroupRows - 1) / kKeys);
        float base[2] = {-INFINITY, -INFINITY}, row_sum[2] = {}, tile_sum[2];

        auto mask = [&](int tile) {
            const int key0 = tile * kKeys;
            if (key0 + kKeys > first_row || (args.window && key0 < first_row + kGroupRows - args.window)) {
#pragma unroll
                for (int i = 0; i < kKeys / 2; ++i) {
                    const int key = key0 + i / 4 * 8 + lane % 4 * 2 + i % 2, of = row + i / 2 % 2 * 8;
                    if (key > of || (args.window && key <= of - args.window)) scores[i] = -INFINITY;
                }
            }
        };
        // Raises the base of a row to the largest of the scores, and returns what its sums so far are to be multiplied with.
        auto raise_base = [&](int half) {
            float maximum = base[half];
#pragma unroll
            for (int j = half * 2; j < kKeys / 2; j += 4) maximum = fmaxf(maximum, fmaxf(scores[j], scores[j + 1]));
            maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 1));
            maximum = fmaxf(maximum, __shfl_xor_sync(0xffffffffu, maximum, 2));
            const float factor = exp2_fast((base[half] - maximum) * args.scale_log2);
            base[half] = maximum;
            return factor;
        };
        auto exponentials = [&] {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float shift = base[half] * args.scale_log2;
                float sum = 0.f;
#pragma unroll
                for (int j = half * 2; j < kKeys / 2; j += 4) {
                    scores[j] = exp2_fast(scores[j] * args.scale_log2 - shift);
                    scores[j + 1] = exp2_fast(scores[j + 1] * args.scale_log2 - shift);
                    sum += scores[j] + scores[j + 1];
                }
                tile_sum[half] = sum;
            }
        };
        auto round_probabilities = [&] {
#pragma unroll
            for (int i = 0; i < kKeys / 4; ++i) probabilities[i] = pack(scores[2 * i], scores[2 * i + 1]);
        };
        // After a barrier of the warpgroup, with no product under way: settles the tile whose probabilities were computed last.
        auto settle = [&](int tile, const Ring<S::kStages> &at) {
            if (__any_sync(0xffffffffu, load_word(over_word(tile)))) {
                start_scores(at.stage);
                finish_scores();
                mask(tile);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    int over = tile_sum[half] > kMostSum;
                    over |= __shfl_xor_sync(0xffffffffu, over, 1);
                    over |= __shfl_xor_sync(0xffffffffu, over, 2);
                    const float before = base[half], raised = raise_base(half);
                    if (!over) base[half] = before;
                    const float factor = over ? raised : 1.f;
                    row_sum[half] *= factor;
#pragma unroll
                    for (int i = half * 2; i < kHeadDim / 2; i += 4) out[i] *= factor, out[i + 1] *= factor;
                }
                exponentials();
                round_probabilities();
                // All have read the word before it is cleared, and none sets it before.
                sync_threads<128>(kGroupBarriers + group);
                if (thread % 128 == 0) store_word(over_word(tile), 0);
                sync_threads<128>(kGroupBarriers + group);
            }
            release(shared.k_empty, at);
            row_sum[0] += tile_sum[0];
            row_sum[1] += tile_sum[1];
        };

        if (const int dead = (piece.last_tile + 1) * kKeys - schedule.rows; dead > 0) {
            wait_for(shared.v_full, at);
            clear_rows<kHeadDim, S::kConsumers>(shared.v + at.stage * S::kTileBytes, kKeys - dead, thread);
            sync_threads<S::kConsumers>(1);
        }
        // Tiles that only the rows of later warpgroups see.
        for (int tile = piece.last_tile; tile > last_tile; --tile, at.next()) {
            wait_for(shared.k_full, at);
            release(shared.k_empty, at);
            wait_for(shared.v_full, at);
            release(shared.v_empty, at);
            take_turn();
            pass_turn();
        }
        barrier_wait(shared.q_full, parity);
        wait_for(shared.k_full, at);
        start_scores(at.stage);
        finish_scores();
        mask(last_tile);
        // A row sees its own key in its first tile, so that it has a maximum.
        raise_base(0);
        raise_base(1);
        exponentials();
        round_probabilities();

        Ring<S::kStages> previous = at;
        at.next();
        for (int tile = last_tile - 1; tile >= piece.first_tile; --tile) {
            wait_for(shared.k_full, at);
            take_turn();
            settle(tile + 1, previous);
            start_scores(at.stage);
            wait_for(shared.v_full, previous);
            start_product(previous.stage, tile == last_tile - 1);
            pass_turn();
            wgmma_wait<1>();
            wgmma_results(scores);
            mask(tile);
            exponentials();
            if (tile_sum[0] > kMostSum || tile_sum[1] > kMostSum) store_word(over_word(tile), 1);
            wgmma_wait<0>();
            wgmma_results(out);
            release(shared.v_empty, previous);
            round_probabilities();
            previous = at;
            at.next();
        }
        sync_threads<128>(kGroupBarriers + group);
        settle(piece.first_tile, previous);
        if (leads) barrier_arrive_here(shared.q_empty);
        wait_for(shared.v_full, previous);
        start_product(previous.stage, piece.first_tile == last_tile);
        wgmma_wait<0>();
        wgmma_results(out);
        release(shared.v_empty, previous);

#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float sum = row_sum[half];
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            const float factor = 1.f / sum;
            const int of = row + half * 8;
            const int out_row = of - schedule.first_row();
            bf16 *to = args.out + (static_cast<size_t>(out_row) * args.num_heads + piece.head) * kHeadDim + lane % 4 * 8;
#pragma unroll
            for (int j = 0; j < kHeadDim / 32; ++j) {
                uint32_t words[4];
#pragma unroll
                for (int w = 0; w < 4; ++w) {
                    const float *at = out + (j * 4 + w) * 4 + half * 2;
                    words[w] = pack(at[0] * factor, at[1] * factor);
                }
                const uint4 piece_of_row = transpose(words);
                if (out_row >= 0 && of < schedule.rows) *reinterpret_cast<uint4 *>(to + j * 32) = piece_of_row;
            }
        }
    }
}

template <int kHeadDim, int kGroups>
__global__ void __launch_bounds__(Shape<kHeadDim, kGroups>::kThreads, 1)
    attention_sm90_kernel(const __grid_constant__ CUtensorMap map, const Args args) {
    using S = Shape<kHeadDim, kGroups>;
    start_next();
    extern __shared__ unsigned char memory[];
    __shared__ uint64_t barriers[2 + 4 * kMaxStages];
    __shared__ int over[2 * kMaxGroups];
    const uint32_t q_full = shared_address(barriers), first = q_full + 16;
    const uint32_t q = (shared_address(memory) + 1023) / 1024 * 1024, k = q + S::kRows * S::kRowBytes;
    const Shared shared{q, k, k + S::kStages * S::kTileBytes, q_full, q_full + 8, first, first + kMaxStages * 8,
                        first + kMaxStages * 16, first + kMaxStages * 24, shared_address(over)};
    if (threadIdx.x == 0) {
        constexpr int kWarps = S::kConsumers / 32;
        prefetch_map(&map);
        barrier_init(shared.q_full, 1);
        barrier_init(shared.q_empty, kWarps);
        for (int stage = 0; stage < S::kStages; ++stage) {
            barrier_init(shared.k_full + stage * 8, 1);
            barrier_init(shared.k_empty + stage * 8, kWarps);
            barrier_init(shared.v_full + stage * 8, 1);
            barrier_init(shared.v_empty + stage * 8, kWarps);
        }
        barrier_init_fence();
        for (int &word : over) word = 0;
    }
    __syncthreads();
    wait_for_previous();
    // The roles are the two branches of one condition: what setmaxnreg asks for.
    if (threadIdx.x < 128) {
        give_registers<S::kCopyRegisters>();
        if (warp_index() == 0 && elect()) produce<kHeadDim, kGroups>(&map, args, shared);
    } else {
        take_registers<S::kRegisters>();
        consume<kHeadDim, kGroups>(args, shared);
    }
}

template <int kHeadDim, int kGroups>
int32_t launch(const CUtensorMap &map, const Args &args, int max_rows, int multiprocessors, void *stream) {
    using S = Shape<kHeadDim, kGroups>;
    const int most_pieces = divide_up(max_rows, S::kRows) * args.num_heads;
    const int grid = most_pieces < multiprocessors ? most_pieces : multiprocessors;
    return launch_overlapping(attention_sm90_kernel<kHeadDim, kGroups>, grid, S::kThreads, S::kSharedBytes, stream, map,
                              args);
}

}  // namespace

extern "C" int32_t gleaner_attention_sm90(void *out, const void *qkv, const int32_t *rows, const int32_t *first_row,
                                          int32_t max_rows, int32_t num_heads, int32_t num_kv_heads, int32_t head_dim,
                                          int32_t window, void *stream) {
    if (head_dim != 64 && head_dim != 128) return cudaErrorInvalidValue;
    const float log2_e = 1.4426950408889634f;
    const Args args{static_cast<bf16 *>(out), rows, first_row, num_heads, num_kv_heads, window,
                    log2_e / sqrtf(static_cast<float>(head_dim))};
    const int columns = (num_heads + 2 * num_kv_heads) * head_dim;
    CUtensorMap map;
    const int32_t made = make_tensor_map(&map, static_cast<const bf16 *>(qkv), max_rows, columns, kBoxRows);
    if (made != 0) return made;
    int multiprocessors;
    if (const cudaError_t status = device_attribute(&multiprocessors, cudaDevAttrMultiProcessorCount)) return status;
    if (head_dim == 128) return launch<128, 2>(map, args, max_rows, multiprocessors, stream);
    // Three warpgroups multiply more in the same time, but their longer pieces must be enough to share out well.
    if (divide_up(max_rows, 3 * kGroupRows) * num_heads * 5 >= multiprocessors * 8)
        return launch<64, 3>(map, args, max_rows, multiprocessors, stream);
    return launch<64, 2>(map, args, max_rows, multiprocessors, stream);
}
