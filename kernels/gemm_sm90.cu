// out = epilogue(a w^T) on Hopper: the linear layers with its copy engine and warpgroup products.
//
// Two CTAs on neighbouring multiprocessors, a cluster, walk together over pairs of tiles of the output: rows below each
// other, the same columns of it, so that each fetches half of the weights for both. The first warpgroup of a CTA copies:
// one thread fills a ring of stages of 64 columns of a and of the weight. The two others multiply, and hold the
// next stage in flight while they wait for the one before. They share a tile, 64 rows each, or take whole tiles in turns, so
// that one stores while the other multiplies: what pays where tiles are many and the epilogue is long.
//
// A tile is 128 rows by 128, 192 or 256 columns. Wide tiles move fewer bytes a product, narrow ones fill the last wave
// better; which costs least depends on the number of live rows, so that the device chooses.
//
// Rows of a beyond the live count may hold anything: a row of a touches its own row of the product alone. They are never
// written, and pairs of tiles without a live row do not exist.
#include "epilogue.cuh"
#include "hopper.cuh"
#include "kernels.h"

namespace {

constexpr int kTileM = 128, kTileK = kBoxColumns;
constexpr int kCluster = 2;       // CTAs
constexpr int kWeightBox = 32;    // rows of the weight in a copy
constexpr int kABytes = kTileM * kTileK * 2, kWeightBoxBytes = kWeightBox * kTileK * 2;
constexpr int kThreads = 384;
constexpr int kRingBytes = 200 * 1024, kMaxStages = 6;
constexpr int kSharedBytes = kRingBytes + 1024;  // the ring starts at a multiple of 1024

// How the two warpgroups that multiply share work. A tile costs its columns for each 64 of k, and kTileCost.
struct Together {
    static constexpr bool kInTurns = false;
    static constexpr int kTileCost = 300;
};
struct InTurns {
    static constexpr bool kInTurns = true;
    static constexpr int kTileCost = 30;
};

// Rope for heads of one size: what it loads repeats.
template <int kHeadDim>
struct HeadRope : Rope {};

// Groups of 16 columns after which what an epilogue loads repeats.
template <class Epilogue>
constexpr int kPeriod = INT32_MAX;
template <int kHeadDim>
constexpr int kPeriod<HeadRope<kHeadDim>> = kHeadDim / 16;

// Sums, and what the epilogue asks for early, must fit the registers.
template <class Groups, class Epilogue>
constexpr int kMaxTileN = Groups::kInTurns || sizeof(typename Epilogue::Loaded) > 8 ? 192 : 256;

template <int kTileN>
constexpr int kStageBytes = (kTileM + kTileN) * kTileK * 2;
template <int kTileN>
constexpr int kStages = kRingBytes / kStageBytes<kTileN>;
static_assert(kStages<128> == kMaxStages);

struct Operands {
    const bf16 *bias;  // [n] or null
    const int32_t *rows;
    const int32_t *row_start;  // first row of a, or null for 0
    int n, k;
};

// The work of all clusters: pairs of tiles, those of one tile of the weight after the other.
struct Schedule {
    int rows, row_start, k_tiles, pairs_m;
    int tile_n, pairs;
    __device__ int cluster() const { return blockIdx.x / kCluster; }
    __device__ int clusters() const { return gridDim.x / kCluster; }
    __device__ int row(int pair) const { return (pair % pairs_m * kCluster + cluster_rank()) * kTileM; }
    template <int kTileN>
    __device__ int column(int pair) const {
        return pair / pairs_m * kTileN;
    }
};

// With the tile width that takes the least time.
template <class Groups, class Epilogue>
__device__ Schedule schedule_of(const Operands &operands) {
    const int rows = *operands.rows, row_start = operands.row_start ? *operands.row_start : 0;
    Schedule best{rows, row_start, divide_up(operands.k, kTileK), divide_up(rows, kTileM * kCluster), 0, 0};
    const int clusters = gridDim.x / kCluster;
    int least = INT32_MAX;
#pragma unroll
    for (int tile_n = 128; tile_n <= kMaxTileN<Groups, Epilogue>; tile_n += 64) {
        const int pairs = best.pairs_m * divide_up(operands.n, tile_n);
        const int cost = divide_up(pairs, clusters) * (best.k_tiles * tile_n + Groups::kTileCost);
        if (cost >= least) continue;
        least = cost, best.tile_n = tile_n, best.pairs = pairs;
    }
    return best;
}

template <int kTileN>
struct Tile {
    static constexpr int n = kTileN;
};

// Calls `run` with the tile chosen.
template <int kMaxTileN, class Run>
__device__ void with_tile(const Schedule &schedule, const Run &run) {
    if (schedule.tile_n == 128) return run(Tile<128>{});
    if (kMaxTileN == 192 || schedule.tile_n == 192) return run(Tile<192>{});
    if constexpr (kMaxTileN == 256) run(Tile<256>{});
}

template <int kTileN>
__device__ void produce(const CUtensorMap *a_map, const CUtensorMap *weight_map, const Schedule &schedule,
                        uint32_t ring, uint32_t full, uint32_t empty) {
    constexpr int kHalf = kTileN / kCluster;
    const int first = cluster_rank() * kHalf;
    Ring<kStages<kTileN>> at;
    for (int pair = schedule.cluster(); pair < schedule.pairs; pair += schedule.clusters()) {
        const int row = schedule.row_start + schedule.row(pair), column = schedule.column<kTileN>(pair);
        for (int k_tile = 0; k_tile < schedule.k_tiles; ++k_tile, at.next()) {
            const uint32_t stage = ring + at.stage * kStageBytes<kTileN>, barrier = full + at.stage * 8;
            // Both CTAs have read the stage, for half of what is copied goes to the other's.
            barrier_wait(empty + at.stage * 8, at.parity ^ 1);
            barrier_expect(barrier, kStageBytes<kTileN>);
            copy_box(stage, a_map, row, k_tile * kTileK, barrier);
#pragma unroll
            for (int box = first; box < first + kHalf; box += kWeightBox)
                copy_box_to(stage + kABytes + box / kWeightBox * kWeightBoxBytes, weight_map, column + box,
                            k_tile * kTileK, barrier, (1 << kCluster) - 1);
        }
    }
}

// Stores the two rows of a tile that this thread holds sums of, eight apart: two of each group of eight columns.
template <int kTileN, int kUnique, bool kBias, class Epilogue>
__device__ void finish(const Operands &operands, const Epilogue &epilogue, const float (&c)[kTileN / 2],
                       const typename Epilogue::Loaded (&loaded)[kUnique][2], int row, int rows, int tile_column) {
    constexpr int kWords = Epilogue::kWords;
    const int lane = threadIdx.x % 32, first_column = tile_column + lane % 4 * 2;
    // Four groups of eight columns of the output at a time, each lane to store one of them.
    constexpr int kPairs = 4 / kWords;  // of groups of the product
#pragma unroll
    for (int j = 0; j < kTileN / 16; j += kPairs) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t words[4];
#pragma unroll
            for (int p = 0; p < kPairs; ++p) {
                const int column = first_column + (j + p) * 16;
                float2 bias_low{}, bias_high{};
                if (kBias && column < operands.n) {
                    bias_low = unpack(__ldg(reinterpret_cast<const uint32_t *>(operands.bias + column)));
                    bias_high = unpack(__ldg(reinterpret_cast<const uint32_t *>(operands.bias + column + 8)));
                }
                const float *low_at = c + (j + p) * 8 + half * 2, *high_at = low_at + 4;
                const float low[2] = {low_at[0] + bias_low.x, low_at[1] + bias_low.y};
                const float high[2] = {high_at[0] + bias_high.x, high_at[1] + bias_high.y};
                uint32_t result[kWords];
                epilogue.apply(result, column, low, high, loaded[(j + p) % kUnique][half]);
#pragma unroll
                for (int w = 0; w < kWords; ++w) words[p * kWords + w] = result[w];
            }
            const uint4 group = transpose(words);
            const int column = (tile_column + j * 16) * kWords / 2 + lane % 4 * 8;
            if (row + half * 8 < rows && column < operands.n * kWords / 2)
                *reinterpret_cast<uint4 *>(epilogue.out + static_cast<size_t>(row + half * 8) * epilogue.out_stride +
                                           column) = group;
        }
    }
}

template <class Groups, int kTileN, bool kBias, class Epilogue>
__device__ void consume(const Operands &operands, const Epilogue &epilogue, const Schedule &schedule, uint32_t ring,
                        uint32_t full, uint32_t empty) {
    constexpr int kStrips = Groups::kInTurns ? 2 : 1;  // of 64 rows, that a warpgroup multiplies
    constexpr int kStripBytes = 64 * kTileK * 2;
    const int warp = threadIdx.x / 32 - 4, group = warp / 4, lane = threadIdx.x % 32;
    const int first_strip = Groups::kInTurns ? 0 : group;
    Ring<kStages<kTileN>> at;
    int turn = 0;
    for (int pair = schedule.cluster(); pair < schedule.pairs; pair += schedule.clusters(), ++turn) {
        if (Groups::kInTurns && turn % 2 != group) {
            at.skip(schedule.k_tiles);
            continue;
        }
        const int row = schedule.row(pair) + first_strip * 64 + warp % 4 * 16 + lane / 4;
        const int tile_column = schedule.column<kTileN>(pair), first_column = tile_column + lane % 4 * 2;
        // What the epilogue reads is asked for now and is there when the product is.
        constexpr int kUnique = kTileN / 16 < kPeriod<Epilogue> ? kTileN / 16 : kPeriod<Epilogue>;
        typename Epilogue::Loaded loaded[kStrips][kUnique][2];
#pragma unroll
        for (int strip = 0; strip < kStrips; ++strip)
#pragma unroll
            for (int j = 0; j < kUnique; ++j)
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    if (row + strip * 64 + half * 8 < schedule.rows && first_column + j * 16 < operands.n)
                        loaded[strip][j][half] = epilogue.load(row + strip * 64 + half * 8, first_column + j * 16);

        // A barrier tells one phase from the next, not from the one after that: stages may be waited for only when all
        // before them are there.
        if (Groups::kInTurns && turn > 0) wait_for_turn(1 + group);
        float c[kStrips][kTileN / 2];
        int previous = 0;
        for (int k_tile = 0; k_tile < schedule.k_tiles; ++k_tile, at.next()) {
            barrier_wait(full + at.stage * 8, at.parity);
            const uint32_t stage = ring + at.stage * kStageBytes<kTileN>;
            const uint64_t a = box_descriptor(stage + first_strip * kStripBytes);
            const uint64_t weight = box_descriptor(stage + kABytes);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < kTileK / 16; ++step)
#pragma unroll
                for (int strip = 0; strip < kStrips; ++strip)
                    wgmma<kTileN>(c[strip], a + strip * (kStripBytes / 16) + step * kDescriptorStep,
                                  weight + step * kDescriptorStep, k_tile + step);
            wgmma_commit();
            wgmma_wait<1>();
            if (k_tile > 0 && lane < kCluster) barrier_arrive(empty + previous * 8, lane);
            previous = at.stage;
        }
        if (Groups::kInTurns && pair + schedule.clusters() < schedule.pairs) give_turn(2 - group);
        wgmma_wait<0>();
        if (lane < kCluster) barrier_arrive(empty + previous * 8, lane);
#pragma unroll
        for (int strip = 0; strip < kStrips; ++strip) {
            wgmma_results(c[strip]);
            finish<kTileN, kUnique, kBias>(operands, epilogue, c[strip], loaded[strip], row + strip * 64, schedule.rows,
                                           tile_column);
        }
    }
}

template <class Groups, bool kBias, class Epilogue>
__global__ void __cluster_dims__(kCluster) __launch_bounds__(kThreads, 1)
    gemm_sm90_kernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap weight_map,
                     const Operands operands, const Epilogue epilogue) {
    extern __shared__ unsigned char shared[];
    __shared__ uint64_t full_barriers[kMaxStages], empty_barriers[kMaxStages];
    const uint32_t ring = (shared_address(shared) + 1023) / 1024 * 1024;
    const uint32_t full = shared_address(full_barriers), empty = shared_address(empty_barriers);
    const Schedule schedule = schedule_of<Groups, Epilogue>(operands);
    if (threadIdx.x == 0) {
        prefetch_map(&a_map);
        prefetch_map(&weight_map);
        const int warps = Groups::kInTurns ? 4 : 8;  // that multiply a stage
        for (int stage = 0; stage < kMaxStages; ++stage) {
            barrier_init(full + stage * 8, 1);
            barrier_init(empty + stage * 8, warps * kCluster);
        }
        barrier_init_fence();
    }
    cluster_sync();

    // The roles are the two branches of one condition: what setmaxnreg asks for.
    if (threadIdx.x < 128) {
        give_registers<40>();
        if (threadIdx.x == 0)
            with_tile<kMaxTileN<Groups, Epilogue>>(schedule, [&](auto tile) {
                produce<tile.n>(&a_map, &weight_map, schedule, ring, full, empty);
            });
    } else {
        take_registers<232>();
        with_tile<kMaxTileN<Groups, Epilogue>>(schedule, [&](auto tile) {
            consume<Groups, tile.n, kBias>(operands, epilogue, schedule, ring, full, empty);
        });
    }
    // The other CTA may still copy to this one's memory and arrive at its barriers.
    cluster_sync();
}

// a holds a_rows rows, dead ones among them.
template <class Groups, bool kBias, class Epilogue>
int32_t launch(const void *a, int a_rows, const void *weight, const Operands &operands, const Epilogue &epilogue,
               int max_rows, void *stream) {
    CUtensorMap a_map, weight_map;
    if (const int32_t status = make_tensor_map(&a_map, a, a_rows, operands.k, kTileM)) return status;
    if (const int32_t status = make_tensor_map(&weight_map, weight, operands.n, operands.k, kWeightBox)) return status;
    int device, multiprocessors;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (status == cudaSuccess)
        status = cudaFuncSetAttribute(gemm_sm90_kernel<Groups, kBias, Epilogue>,
                                      cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (status != cudaSuccess) return status;
    const int pairs_m = (max_rows + kTileM * kCluster - 1) / (kTileM * kCluster);
    const int most_pairs = pairs_m * ((operands.n + 127) / 128);
    const int clusters = most_pairs < multiprocessors / kCluster ? most_pairs : multiprocessors / kCluster;
    gemm_sm90_kernel<Groups, kBias, Epilogue>
        <<<clusters * kCluster, kThreads, kSharedBytes, static_cast<cudaStream_t>(stream)>>>(a_map, weight_map, operands,
                                                                                           epilogue);
    return cudaGetLastError();
}

template <class Groups, class Epilogue>
int32_t launch(const void *a, int a_rows, const void *weight, const Operands &operands, const Epilogue &epilogue,
               int max_rows, void *stream) {
    // A bias takes registers that turns have not.
    return operands.bias ? launch<Together, true>(a, a_rows, weight, operands, epilogue, max_rows, stream)
                         : launch<Groups, false>(a, a_rows, weight, operands, epilogue, max_rows, stream);
}

}  // namespace

extern "C" int32_t gleaner_gemm_sm90_residual(void *x, const void *a, const void *weight, const void *bias,
                                              const int32_t *rows, int32_t max_rows, int32_t n, int32_t k,
                                              void *stream) {
    const Operands operands{static_cast<const bf16 *>(bias), rows, nullptr, n, k};
    return launch<Together>(a, max_rows, weight, operands, Residual{static_cast<bf16 *>(x), n}, max_rows, stream);
}

extern "C" int32_t gleaner_gemm_sm90_swiglu(void *out, const void *a, const void *weight, const void *bias,
                                            const int32_t *rows, int32_t max_rows, int32_t n, int32_t k, void *stream) {
    const Operands operands{static_cast<const bf16 *>(bias), rows, nullptr, n, k};
    return launch<InTurns>(a, max_rows, weight, operands, SwiGlu{static_cast<bf16 *>(out), n / 2}, max_rows, stream);
}

extern "C" int32_t gleaner_gemm_sm90_rope(void *out, const void *a, const void *weight, const void *bias,
                                          const void *table, const int32_t *rows, const int32_t *row_start,
                                          int32_t max_rows, int32_t a_rows, int32_t n, int32_t k, int32_t head_dim,
                                          int32_t rope_columns, void *stream) {
    const Operands operands{static_cast<const bf16 *>(bias), rows, row_start, n, k};
    const Rope rope{static_cast<bf16 *>(out), static_cast<const float2 *>(table), row_start, n, head_dim, rope_columns};
    switch (head_dim) {
        case 64: return launch<Together>(a, a_rows, weight, operands, HeadRope<64>{rope}, max_rows, stream);
        case 128: return launch<Together>(a, a_rows, weight, operands, HeadRope<128>{rope}, max_rows, stream);
        default: return cudaErrorInvalidValue;
    }
}
