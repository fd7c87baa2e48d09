// The pipeline of the products on Hopper, with its copy engine and warpgroup products.
//
// Two CTAs on neighbouring multiprocessors, a cluster, walk together over pairs of tiles of the output: nearly all of them one
// below the other, in the same columns, so that each fetches half of the weights for both. The first warpgroup of a CTA copies:
// one thread fills a ring of stages of 64 columns of a and of the weight. The others multiply, 64 rows each, and hold the next
// stage in flight while they wait for the one before.
//
// Large tiles move fewer bytes a product, small ones fill the last wave better. Which costs least depends on the number of live
// rows, which the device alone knows: the host works it out for all that may be, and the device looks it up.
//
// A kernel starts while the one before it still runs. Up to wait_for_previous it reads the counts, which were there when that
// one started, and asks for weights, as many as the ring has stages for.
//
// Rows of a beyond the live count may hold anything: a row of a touches its own row of the product alone. Pairs of tiles
// without a live row do not exist, and strips of 64 rows without one are not fetched.
#pragma once

#include "epilogue.cuh"
#include "hopper.cuh"

constexpr int kTileK = kBoxColumns;
constexpr int kCluster = 2;  // CTAs
constexpr int kStrip = 64;   // rows that a warpgroup multiplies at once, and of a in a copy
constexpr int kStripBytes = kStrip * kTileK * 2;
constexpr int kWeightBox = 32;  // rows of the weight in a copy, and half of them in a last one

// A tile of the output, and the ring of stages, each with room for kStageColumns columns.
template <int kRows, int kColumns, int kRingBytes, int kStageColumns = kColumns>
struct Tile {
    static constexpr int m = kRows, n = kColumns;
    static constexpr int kABytes = m * kTileK * 2, kWeightBytes = n * kTileK * 2;
    static constexpr int kStageBytes = kABytes + kStageColumns * kTileK * 2;
    static constexpr int kStages = kRingBytes / kStageBytes;
    using At = Ring<kStages>;
};
constexpr int kMaxStages = 6;

struct Operands {
    const int32_t *rows;
    const int32_t *row_start;  // first row of a, or null for 0
    int n, k;
};

// The work of all clusters: pairs of tiles. Two columns of tiles hold as many pairs as there are rows of tiles: those of the
// left column, two rows each, then those of the right. Where the rows are odd in number, two tiles of the last one come first,
// beside each other and with weights of their own: a pair below each other would compute one tile for nobody.
struct Schedule {
    // A CTA's tile of a pair.
    struct Place {
        int row, column;
        bool beside;
    };
    int rows, row_start, n, k_tiles;
    __device__ explicit Schedule(const Operands &operands)
        : rows(*operands.rows),
          row_start(start_of_rows(operands.row_start)),
          n(operands.n),
          k_tiles(divide_up(operands.k, kTileK)) {}
    __device__ static int cluster() { return blockIdx.x / kCluster; }
    __device__ static int clusters() { return gridDim.x / kCluster; }
    template <class T>
    __host__ __device__ static int pairs(int rows, int n) {
        const int down = divide_up(rows, T::m), across = divide_up(n, T::n);
        return across / 2 * down + across % 2 * divide_up(down, 2);
    }
    template <class T>
    __device__ int pairs() const {
        return pairs<T>(rows, n);
    }
    // Of the columns from first_column on, the pair of this number.
    template <class T>
    __device__ Place place(int pair, int first_column = 0) const {
        const int down = divide_up(rows, T::m), left = divide_fast(pair, down) * 2, rank = cluster_rank();
        const int odd = down % 2, in_columns = pair - left / 2 * down - odd;
        if (in_columns < 0) return {(down - 1) * T::m, first_column + (left + rank) * T::n, true};
        const int right = in_columns >= down / 2;
        return {((in_columns - right * (down / 2)) * kCluster + rank) * T::m,
                first_column + (left + right) * T::n, false};
    }
    // How many strips of the tile from `row` on have a live row.
    template <class T>
    __device__ int strips(int row) const {
        return min(max(divide_up(rows - row, kStrip), 0), T::m / kStrip);
    }
};

// What the host has chosen for each number of live strips of 64 rows; beyond the last, as for the last.
struct Choices {
    static constexpr int kMost = 128;
    uint8_t by_strips[kMost];
    __device__ int of(int rows) const { return by_strips[max(min(divide_up(rows, kStrip), kMost), 1) - 1]; }
};
template <class Choose>
Choices choices(const Choose &choose) {
    Choices made;
    for (int strips = 1; strips <= Choices::kMost; ++strips) made.by_strips[strips - 1] = choose(strips * kStrip);
    return made;
}

// What so many tiles cost that a CTA takes one after the other: elements / 128 for each 64 of k, and what comes on top.
template <class T>
int64_t cost_of(int tiles, int k_tiles, int on_top) {
    return tiles * (static_cast<int64_t>(k_tiles) * (T::m * T::n / 128) + on_top);
}

// The tiles that a kernel has code for. One costs kTileCost on top.
template <int kTileCost, class... Tiles>
struct Menu {
    // Which tile costs least, and what.
    struct Choice {
        int tile;
        int64_t cost;
    };
    static Choice choose(int rows, int n, int k_tiles, int clusters) {
        Choice best{0, INT64_MAX};
        int tile = 0;
        const auto consider = [&](auto a_tile) {
            using T = decltype(a_tile);
            const int waves = divide_up(Schedule::pairs<T>(rows, n), clusters);
            const int64_t cost = cost_of<T>(waves, k_tiles, kTileCost);
            if (cost < best.cost) best = {tile, cost};
            ++tile;
        };
        (consider(Tiles{}), ...);
        return best;
    }
    // Calls `run` with the tile chosen.
    template <class Run>
    __device__ static void with(int tile, const Run &run) {
        int index = 0;
        ((tile == index++ && (run(Tiles{}), true)) || ...);
    }
};

// The weight in boxes of kWeightBox rows, and of half of them.
struct WeightMaps {
    CUtensorMap whole, half;
};

// The ring of a CTA, as addresses in shared memory: stages, and the barriers that say that one is full or empty.
struct Stages {
    uint32_t ring, full, empty;
};

// Called by all threads; `warps` is how many of them multiply a stage. The ring starts at a multiple of 1024, and is ready
// after cluster_wait.
__device__ inline Stages make_stages(const CUtensorMap *a_map, const WeightMaps &weight_maps, int warps) {
    extern __shared__ unsigned char shared[];
    __shared__ uint64_t full[kMaxStages], empty[kMaxStages];
    Stages stages{(shared_address(shared) + 1023) / 1024 * 1024, shared_address(full), shared_address(empty)};
    if (threadIdx.x == 0) {
        prefetch_map(a_map);
        prefetch_map(&weight_maps.whole);
        prefetch_map(&weight_maps.half);
        for (int stage = 0; stage < kMaxStages; ++stage) {
            barrier_init(stages.full + stage * 8, 1);
            barrier_init(stages.empty + stage * 8, warps * kCluster);
        }
        barrier_init_fence();
    }
    cluster_arrive();
    // Else they are worked out anew wherever they are used.
    asm volatile("" : "+r"(stages.ring), "+r"(stages.full), "+r"(stages.empty));
    return stages;
}

// Opens a stage, and copies the weights of the tile's columns: half of those of two tiles in the same columns, or all of a
// tile's own.
template <class T>
__device__ void fill_weights(const WeightMaps &weight_maps, const Schedule &schedule, const Stages &stages,
                             const typename T::At &at, const Schedule::Place &place, int k_tile) {
    constexpr int kHalf = T::n / kCluster;  // columns
    constexpr uint16_t kAll = (1 << kCluster) - 1;
    const int rank = cluster_rank();
    const int first_half = place.beside ? 0 : rank, last_half = place.beside ? kCluster - 1 : rank;
    const uint16_t readers = place.beside ? 1 << rank : kAll;
    const uint32_t weight = stages.ring + at.stage * T::kStageBytes + T::kABytes, barrier = stages.full + at.stage * 8;
    barrier_expect(barrier, schedule.strips<T>(place.row) * kStripBytes + T::kWeightBytes);
#pragma unroll 1
    for (int half = first_half; half <= last_half; ++half)
#pragma unroll
        for (int box = 0; box < kHalf; box += kWeightBox)
            copy_box_to(weight + (half * kHalf + box) * kTileK * 2,
                        box + kWeightBox <= kHalf ? &weight_maps.whole : &weight_maps.half,
                        place.column + half * kHalf + box, k_tile * kTileK, barrier, readers);
}

// What can be copied before the kernel before this one has ended: the weights of the first stages. Returns how many.
template <class T>
__device__ int fill_ahead(const WeightMaps &weight_maps, const Schedule &schedule, const Stages &stages, typename T::At at,
                          const Schedule::Place &place) {
    const int count = min(T::kStages, schedule.k_tiles);
#pragma unroll 1
    for (int k_tile = 0; k_tile < count; ++k_tile, at.next())
        fill_weights<T>(weight_maps, schedule, stages, at, place, k_tile);
    return count;
}

// Fills the stages of a tile, one for each 64 of k: rows of a, and weights but for the first `ahead`, which have them.
template <class T>
__device__ void fill_stages(const CUtensorMap *a_map, const WeightMaps &weight_maps, const Schedule &schedule,
                            const Stages &stages, typename T::At &at, const Schedule::Place &place, int ahead) {
    const int strips = schedule.strips<T>(place.row);
#pragma unroll 1
    for (int k_tile = 0; k_tile < schedule.k_tiles; ++k_tile, at.next()) {
        const uint32_t a = stages.ring + at.stage * T::kStageBytes, barrier = stages.full + at.stage * 8;
        if (k_tile >= ahead) {
            // Both CTAs have read the stage, for half of what is copied goes to the other's.
            barrier_wait(stages.empty + at.stage * 8, at.parity ^ 1);
            fill_weights<T>(weight_maps, schedule, stages, at, place, k_tile);
        }
#pragma unroll
        for (int strip = 0; strip < T::m / kStrip; ++strip)
            if (strip < strips)
                copy_box(a + strip * kStripBytes, a_map, schedule.row_start + place.row + strip * kStrip, k_tile * kTileK,
                         barrier);
    }
}

// The other CTA arrives here as long as it has something to read: this one's memory must be there until then.
template <class T>
__device__ void wait_until_read(const Stages &stages, typename T::At &at) {
    for (int stage = 0; stage < T::kStages; ++stage, at.next()) barrier_wait(stages.empty + at.stage * 8, at.parity ^ 1);
}

// c = a w^T over so many stages, for kStrips strips of 64 rows from `first_strip` on. The last products may still run, and
// the last stage, which is returned, is still in use, until `release_last`.
template <class T, int kStrips>
__device__ int multiply_stages(float (&c)[kStrips][T::n / 2], const Stages &stages, typename T::At &at, int first_strip,
                               int k_tiles) {
    const int lane = threadIdx.x % 32;
    int previous = 0;
#pragma unroll 1
    for (int k_tile = 0; k_tile < k_tiles; ++k_tile, at.next()) {
        barrier_wait(stages.full + at.stage * 8, at.parity);
        const uint32_t stage = stages.ring + at.stage * T::kStageBytes;
        const uint64_t a = box_descriptor(stage + first_strip * kStripBytes);
        const uint64_t weight = box_descriptor(stage + T::kABytes);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kTileK / 16; ++step)
#pragma unroll
            for (int strip = 0; strip < kStrips; ++strip)
                wgmma<T::n>(c[strip], a + strip * (kStripBytes / 16) + step * kDescriptorStep,
                            weight + step * kDescriptorStep, k_tile + step);
        wgmma_commit();
        wgmma_wait<1>();
        if (k_tile > 0 && lane < kCluster) barrier_arrive(stages.empty + previous * 8, lane);
        previous = at.stage;
    }
    return previous;
}

// Lets stages pass that this warp has no use for.
template <class At>
__device__ void skip_stages(const Stages &stages, At &at, int count) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (; count > 0; --count, at.next()) {
        barrier_wait(stages.full + at.stage * 8, at.parity);
        if (lane < kCluster) barrier_arrive(stages.empty + at.stage * 8, lane);
    }
}

__device__ inline void release_last(const Stages &stages, int last) {
    wgmma_wait<0>();
    const int lane = threadIdx.x % 32;
    if (lane < kCluster) barrier_arrive(stages.empty + last * 8, lane);
}

// Clusters that run at a time on this device.
inline int32_t count_clusters(int *clusters) {
    int multiprocessors = 0;
    const cudaError_t status = device_attribute(&multiprocessors, cudaDevAttrMultiProcessorCount);
    *clusters = multiprocessors / kCluster;
    return status;
}

// Launches kernel(a_map, weight_maps, operands, choices, arguments...), in CTAs of `threads` threads and shared_bytes of shared
// memory. a holds a_rows rows, dead ones among them.
template <class... Parameters, class... Arguments>
int32_t launch_gemm(void (*kernel)(CUtensorMap, WeightMaps, Operands, Choices, Parameters...), int clusters, int threads,
                    int shared_bytes, const void *a, int a_rows, const void *weight, const Operands &operands,
                    const Choices &choices, void *stream, Arguments... arguments) {
    CUtensorMap a_map;
    WeightMaps weight_maps;
    const auto *of_weight = static_cast<const bf16 *>(weight);
    if (const int32_t status = make_tensor_map(&a_map, static_cast<const bf16 *>(a), a_rows, operands.k, kStrip))
        return status;
    if (const int32_t status = make_tensor_map(&weight_maps.whole, of_weight, operands.n, operands.k, kWeightBox))
        return status;
    if (const int32_t status = make_tensor_map(&weight_maps.half, of_weight, operands.n, operands.k, kWeightBox / 2))
        return status;
    return launch_overlapping(kernel, clusters * kCluster, threads, shared_bytes, stream, a_map, weight_maps, operands,
                              choices, arguments...);
}
