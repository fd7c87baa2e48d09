// The pipeline of the products on Hopper, with its copy engine and warpgroup products.
//
// The CTAs of a cluster, two or four on neighbouring multiprocessors, walk together over blocks of tiles of the output. Those
// whose tiles lie below each other need the same weights, and those whose tiles lie beside each other the same rows: each
// fetches a part for all. The first warpgroup of a CTA copies: one thread fills a ring of stages of 64 columns of a and of the
// weight. The others multiply, 64 rows each, and hold the next stage in flight while they wait for the one before.
//
// Both must be quick about it: a stage is multiplied in 500 to 1000 clocks. What is the same for all lanes of a warp has to be
// known to the compiler as such, or it goes through registers of each lane, which took about as long as the products.
//
// Large tiles move fewer bytes a product, small ones fill the last wave better. Which costs least depends on the number of live
// rows, which the device alone knows: the host works it out for all that may be, and the device looks it up.
//
// A kernel starts while the one before it still runs. Up to wait_for_previous it reads the counts, which were there when that
// one started, and asks for weights, as many as the ring has stages for.
//
// Rows of a beyond the live count may hold anything: a row of a touches its own row of the product alone. Strips of 64 rows
// without a live row, or of tiles beside each other the parts that a CTA copies, are not fetched; gate and up multiplies what lies
// in place of such strips, the others do not.
#pragma once

#include "epilogue.cuh"
#include "hopper.cuh"

constexpr int kTileK = kBoxColumns;
constexpr int kStrip = 64;  // rows that a warpgroup multiplies at once
constexpr int kStripBytes = kStrip * kTileK * 2;

// A tile of the output, the CTAs of a cluster, which take such tiles together, all beside each other or not, and the ring of
// stages, each with room for kStageColumns columns.
template <int kRows, int kColumns, int kRingBytes, int kCtas, int kStageColumns = kColumns, bool kAllBeside = false>
struct Tile {
    static constexpr int m = kRows, n = kColumns, kCluster = kCtas;
    static constexpr bool kBeside = kAllBeside;
    // What a CTA copies at once: rows of a, if it shares them or not all are live, and of the weight.
    static constexpr int kPartRows = kBeside ? m / kCluster : kStrip;
    static constexpr int weight_rows(int columns) { return kBeside ? columns : columns / kCluster; }
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

// The work of all clusters: blocks of as many tiles as a cluster has CTAs.
//
// Of two, in pairs, one tile below the other: two columns of tiles hold as many pairs as there are rows of tiles, those of the
// left column, two rows each, then those of the right. Where the rows are odd in number, two tiles of the last one come first,
// beside each other: a pair below each other would compute one tile for nobody.
//
// Of four, in squares, and in a last column without a second, one below the other.
//
// Or all beside each other: a CTA fetches less of a and more of the weight. No tile is for nobody where the columns of tiles are
// a multiple of the CTAs; squares need an even number of rows of tiles, too.
struct Schedule {
    // A CTA's tile of a block. So many of the block's tiles lie below each other, and share their weights; those beside each
    // other share rows of a.
    struct Place {
        int row, column, down;
    };
    int rows, row_start, n, k_tiles;
    __device__ explicit Schedule(const Operands &operands)
        : rows(*operands.rows),
          row_start(start_of_rows(operands.row_start)),
          n(operands.n),
          k_tiles(divide_up(operands.k, kTileK)) {}
    template <int kCluster>
    __device__ static int cluster() {
        return blockIdx.x / kCluster;
    }
    template <int kCluster>
    __device__ static int clusters() {
        return gridDim.x / kCluster;
    }
    template <class T>
    __host__ __device__ static int blocks(int rows, int n) {
        const int tile_rows = divide_up(rows, T::m), across = divide_up(n, T::n);
        if (T::kBeside) return tile_rows * divide_up(across, T::kCluster);
        const int of_two_columns = T::kCluster == 2 ? tile_rows : divide_up(tile_rows, 2);
        return across / 2 * of_two_columns + across % 2 * divide_up(tile_rows, T::kCluster);
    }
    template <class T>
    __device__ int blocks() const {
        return blocks<T>(rows, n);
    }
    // Of the columns from first_column on, the block of this number.
    template <class T>
    __device__ Place place(int block, int first_column = 0) const {
        const int tile_rows = divide_up(rows, T::m), rank = cluster_rank();
        if constexpr (T::kBeside) {
            const int group = divide_fast(block, tile_rows);
            return {(block - group * tile_rows) * T::m, first_column + (group * T::kCluster + rank) * T::n, 1};
        } else if constexpr (T::kCluster == 2) {
            const int left = divide_fast(block, tile_rows) * 2;
            const int odd = tile_rows % 2, in_columns = block - left / 2 * tile_rows - odd;
            if (in_columns < 0) return {(tile_rows - 1) * T::m, first_column + (left + rank) * T::n, 1};
            const int right = in_columns >= tile_rows / 2;
            return {((in_columns - right * (tile_rows / 2)) * 2 + rank) * T::m, first_column + (left + right) * T::n, 2};
        } else {
            const int squares = divide_up(tile_rows, 2), left = divide_fast(block, squares) * 2;
            const int in_columns = block - left / 2 * squares;
            if (first_column + (left + 1) * T::n >= n) return {(in_columns * 4 + rank) * T::m, first_column + left * T::n, 4};
            return {(in_columns * 2 + rank % 2) * T::m, first_column + (left + rank / 2) * T::n, 2};
        }
    }
    // How many strips of the tile from `row` on have a live row, or parts of another number of rows.
    template <class T, int kPartRows = kStrip>
    __device__ int strips(int row) const {
        return min(max(divide_up(rows - row, kPartRows), 0), T::m / kPartRows);
    }
};

// Widths of tiles that there are.
constexpr int kMostWidths = 5;
constexpr int kWidths[kMostWidths] = {112, 128, 160, 192, 256};
constexpr int index_of_width(int n) {
    int index = 0;
    while (kWidths[index] != n) ++index;
    return index;
}

// A bit for the width of each tile.
template <class... Tiles>
constexpr uint32_t width_bits = ((1u << index_of_width(Tiles::n)) | ...);

// What the host has chosen for each number of live strips of 64 rows, up to that of max_rows; beyond the last, as for the last.
struct Choices {
    static constexpr int kMost = 128;
    uint8_t by_strips[kMost];
    __device__ int of(int rows) const { return by_strips[max(min(divide_up(rows, kStrip), kMost), 1) - 1]; }
};
template <class Choose>
Choices choices(int max_rows, const Choose &choose) {
    Choices made;
    const int most = max_rows > 0 ? divide_up(max_rows, kStrip) : 1;
    for (int i = 0; i < Choices::kMost; ++i) made.by_strips[i] = i < most ? choose((i + 1) * kStrip) : made.by_strips[most - 1];
    return made;
}

// What so many tiles cost that a CTA takes one after the other: elements / 128 for each 64 of k, and what comes on top.
template <class T>
int64_t cost_of(int tiles, int k_tiles, int on_top) {
    return tiles * (static_cast<int64_t>(k_tiles) * (T::m * T::n / 128) + on_top);
}

// The tiles that a kernel has code for. A tile costs kTileCost on top.
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
            const int waves = divide_up(Schedule::blocks<T>(rows, n), clusters);
            const int64_t cost = cost_of<T>(waves, k_tiles, kTileCost);
            if (cost < best.cost) best = {tile, cost};
            ++tile;
        };
        (consider(Tiles{}), ...);
        return best;
    }
    static constexpr uint32_t kWidthBits = width_bits<Tiles...>;
    // Calls `run` with the tile chosen.
    template <class Run>
    __device__ static void with(int tile, const Run &run) {
        int index = 0;
        ((tile == index++ && (run(Tiles{}), true)) || ...);
    }
};

// a in boxes of as many rows as a tile has, and as a CTA copies at once else; and the weight, for each width of a
// tile in boxes of as many rows as a CTA copies at once.
struct Maps {
    CUtensorMap rows, part, weight[kMostWidths];
};

// The ring of a CTA, as addresses in shared memory: stages, and the barriers that say that one is full or empty.
struct Stages {
    uint32_t ring, full, empty;
};

// Called by all threads; `warps` is how many warps of the cluster multiply a stage. The ring starts at a multiple of 1024, and
// is ready after cluster_wait.
__device__ inline Stages make_stages(const Maps &maps, int warps) {
    extern __shared__ unsigned char shared[];
    __shared__ uint64_t full[kMaxStages], empty[kMaxStages];
    Stages stages{(shared_address(shared) + 1023) / 1024 * 1024, shared_address(full), shared_address(empty)};
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kMaxStages; ++stage) {
            barrier_init(stages.full + stage * 8, 1);
            barrier_init(stages.empty + stage * 8, warps);
        }
        barrier_init_fence();
    }
    if (const int warp = warp_index(); warp < sizeof(Maps) / sizeof(CUtensorMap) && elect()) prefetch_map(&maps.rows + warp);
    cluster_arrive();
    // Else they are worked out anew wherever they are used.
    asm volatile("" : "+r"(stages.ring), "+r"(stages.full), "+r"(stages.empty));
    return stages;
}

// What a CTA copies for a block of which kDown tiles lie below each other: its part of its own tile's weights, for them all,
// and its share of the parts of its own tile's rows, which the tiles beside it have, too. What does not change from stage to
// stage is worked out before.
template <class T, int kDown>
struct Share {
    static constexpr int kAcross = T::kCluster / kDown, kParts = T::m / T::kPartRows, kPartBytes = T::kPartRows * kTileK * 2,
                         kBoxRows = T::weight_rows(T::n), kBoxes = T::n / kDown / kBoxRows, kMap = index_of_width(T::n);
    // A bit for each CTA of the block's first row.
    static constexpr int kFirstRow = kAcross == 1 ? 1 : kAcross == 2 ? 1 | 1 << kDown : (1 << kAcross) - 1;
    static_assert(kAcross <= 2 || kDown == 1);
    const Maps &maps;
    const Stages &stages;
    int parts, beside, a_row, weight_row;
    uint32_t weight_at, bytes;
    uint16_t weight_readers, a_readers;
    __device__ Share(const Maps &all_maps, const Schedule &schedule, const Stages &all_stages, const Schedule::Place &place)
        : maps(all_maps), stages(all_stages) {
        const int rank = cluster_rank(), below = rank & (kDown - 1), first_weight = below * kBoxes * kBoxRows;
        parts = schedule.strips<T, T::kPartRows>(place.row), beside = (rank - below) / kDown;
        a_row = schedule.row_start + place.row, weight_row = place.column + first_weight;
        weight_at = stages.ring + T::kABytes + first_weight * kTileK * 2;
        bytes = parts * kPartBytes + T::kWeightBytes;
        weight_readers = ((1 << kDown) - 1) << (rank - below), a_readers = kFirstRow << below;
    }
    // Opens a stage and copies weights.
    __device__ void fill_weights(const typename T::At &at, int k_tile) const {
        const uint32_t to = weight_at + at.stage * T::kStageBytes, barrier = stages.full + at.stage * 8;
        const CUtensorMap *map = maps.weight + kMap;
        barrier_expect(barrier, bytes);
#pragma unroll
        for (int box = 0; box < kBoxes; ++box) {
            const uint32_t to_box = to + box * kBoxRows * kTileK * 2;
            if (kDown == 1)
                copy_box(to_box, map, weight_row + box * kBoxRows, k_tile * kTileK, barrier);
            else
                copy_box_to(to_box, map, weight_row + box * kBoxRows, k_tile * kTileK, barrier, weight_readers);
        }
    }
    __device__ void fill_rows(const typename T::At &at, int k_tile) const {
        const uint32_t to = stages.ring + at.stage * T::kStageBytes, barrier = stages.full + at.stage * 8;
        if (kAcross == 1 && parts == kParts) return copy_box(to, &maps.rows, a_row, k_tile * kTileK, barrier);
#pragma unroll
        for (int i = 0; i < divide_up(kParts, kAcross); ++i) {
            const int part = i * kAcross + beside;
            if (part >= parts) return;
            const int row = a_row + part * T::kPartRows;
            if (kAcross == 1)
                copy_box(to + part * kPartBytes, &maps.part, row, k_tile * kTileK, barrier);
            else
                copy_box_to(to + part * kPartBytes, &maps.part, row, k_tile * kTileK, barrier, a_readers);
        }
    }
};

// Calls `run` with this CTA's share of a block.
template <class T, class Run>
__device__ void with_share(const Maps &maps, const Schedule &schedule, const Stages &stages, const Schedule::Place &place,
                           const Run &run) {
    if constexpr (T::kBeside)
        run(Share<T, 1>(maps, schedule, stages, place));
    else if (place.down == T::kCluster)
        run(Share<T, T::kCluster>(maps, schedule, stages, place));
    else
        run(Share<T, T::kCluster / 2>(maps, schedule, stages, place));
}

// What can be copied before the kernel before this one has ended: the weights of the first stages. Returns how many.
template <class T>
__device__ int fill_ahead(const Maps &maps, const Schedule &schedule, const Stages &stages, typename T::At at,
                          const Schedule::Place &place) {
    const int count = min(T::kStages, schedule.k_tiles);
    with_share<T>(maps, schedule, stages, place, [&](const auto &share) {
#pragma unroll 1
        for (int k_tile = 0; k_tile < count; ++k_tile, at.next()) share.fill_weights(at, k_tile);
    });
    return count;
}

// Fills the stages of a tile, one for each 64 of k: rows, and weights but for the first `ahead` stages, which have them.
template <class T>
__device__ void fill_stages(const Maps &maps, const Schedule &schedule, const Stages &stages, typename T::At &at,
                            const Schedule::Place &place, int ahead) {
    with_share<T>(maps, schedule, stages, place, [&](const auto &share) {
#pragma unroll 1
        for (int k_tile = 0; k_tile < schedule.k_tiles; ++k_tile, at.next()) {
            if (k_tile >= ahead) {
                // All CTAs have read the stage, for what is copied goes to others, too.
                barrier_wait(stages.empty + at.stage * 8, at.parity ^ 1);
                share.fill_weights(at, k_tile);
            }
            share.fill_rows(at, k_tile);
        }
    });
}

// Other CTAs arrive here as long as they have something to read: this one's memory must be there until then.
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
        if (k_tile > 0 && lane < T::kCluster) barrier_arrive(stages.empty + previous * 8, lane);
        previous = at.stage;
    }
    return previous;
}

// Lets stages pass that this warp has no use for.
template <class T>
__device__ void skip_stages(const Stages &stages, typename T::At &at, int count) {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (; count > 0; --count, at.next()) {
        barrier_wait(stages.full + at.stage * 8, at.parity);
        if (lane < T::kCluster) barrier_arrive(stages.empty + at.stage * 8, lane);
    }
}

template <class T>
__device__ void release_last(const Stages &stages, int last) {
    wgmma_wait<0>();
    const int lane = threadIdx.x % 32;
    if (lane < T::kCluster) barrier_arrive(stages.empty + last * 8, lane);
}

// How many clusters of two run at a time on this device.
inline int32_t count_pairs(int *clusters) {
    int multiprocessors = 0;
    const cudaError_t status = device_attribute(&multiprocessors, cudaDevAttrMultiProcessorCount);
    *clusters = multiprocessors / 2;
    return status;
}

// Launches kernel(maps, operands, choices, arguments...), in so many CTAs of `threads` threads and shared_bytes of shared
// memory, for tiles as T but for their widths, which are those of kWidthBits. a holds a_rows rows, dead ones among them.
template <class T, uint32_t kWidthBits, class... Parameters, class... Arguments>
int32_t launch_gemm(void (*kernel)(Maps, Operands, Choices, Parameters...), int ctas, int threads, int shared_bytes,
                    const void *a, int a_rows, const void *weight, const Operands &operands, const Choices &choices,
                    void *stream, Arguments... arguments) {
    Maps maps;
    const auto *of_a = static_cast<const bf16 *>(a), *of_weight = static_cast<const bf16 *>(weight);
    if (const int32_t status = make_tensor_map(&maps.rows, of_a, a_rows, operands.k, T::m)) return status;
    if (const int32_t status = make_tensor_map(&maps.part, of_a, a_rows, operands.k, T::kPartRows)) return status;
    const auto describe = [&](int i) {
        return make_tensor_map(&maps.weight[i], of_weight, operands.n, operands.k, T::weight_rows(kWidths[i]));
    };
    for (int i = 0; i < kMostWidths; ++i) {
        // No kernel copies by the others, but all are prefetched.
        if (!(kWidthBits >> i & 1))
            maps.weight[i] = maps.rows;
        else if (const int32_t status = describe(i))
            return status;
    }
    return launch_overlapping(kernel, ctas, threads, shared_bytes, stream, maps, operands, choices, arguments...);
}
