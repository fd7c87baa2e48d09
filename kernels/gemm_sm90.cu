// out = epilogue(a w^T) on Hopper: the linear layers but gate and up.
//
// The warpgroups that multiply share a tile. A layer has few tiles, often one a CTA, so that everything beside the product
// shows: above all code that runs once and has to be fetched first, and waiting for what the epilogue reads. So the latter
// comes through the ring behind the last stage of the product; a warp brings its sums through shared memory, some rows
// and columns at a time; and what follows is one short loop over rows of them.
#include <algorithm>
#include <atomic>

#include "gemm_epilogues_sm90.cuh"

namespace {

constexpr int kTileCost = 400;  // as Menu takes it

// Warpgroups that multiply, 64 rows of a tile each, and what that leaves them: registers, and memory for stages; and the CTAs
// of a cluster. Clusters of four fetch less, and leave a few multiprocessors without work. A stage must hold two boxes for an
// epilogue, too.
struct Two {
    static constexpr int kGroups = 2, kCluster = 2, kRingBytes = 200 * 1024, kRegisters = 232, kCopyRegisters = 40;
    template <int kColumns>
    using Of = Tile<128, kColumns, kRingBytes, kCluster>;
    using Tiles = Menu<kTileCost, Of<128>, Of<192>, Of<160>, Of<256>>;
};
struct InFours {
    static constexpr int kGroups = 2, kCluster = 4, kRingBytes = Two::kRingBytes, kRegisters = Two::kRegisters,
                         kCopyRegisters = Two::kCopyRegisters;
    template <int kColumns>
    using Of = Tile<128, kColumns, kRingBytes, kCluster>;
    using Tiles = Menu<kTileCost, Of<128>, Of<192>>;
};
struct Three {
    static constexpr int kGroups = 3, kCluster = 2, kRingBytes = 192 * 1024, kRegisters = 160, kCopyRegisters = 32;
    template <int kColumns>
    using Of = Tile<192, kColumns, kRingBytes, kCluster, 192>;
    using Tiles = Menu<kTileCost, Of<128>, Of<192>, Of<160>>;
};
// 896 columns are eight tiles of 112.
struct FourBeside : InFours {
    template <int kColumns>
    using Of = Tile<128, kColumns, kRingBytes, kCluster, 128, true>;
    using Tiles = Menu<kTileCost, Of<112>>;
};
struct ThreeBeside : Three {
    template <int kColumns>
    using Of = Tile<192, kColumns, kRingBytes, kCluster, 192, true>;
    using Tiles = Menu<kTileCost, Of<112>>;
};
template <class Groups>
constexpr int kThreads = (Groups::kGroups + 1) * 128;
template <class Groups, class Epilogue>
constexpr int kSharedBytes = 1024 + Groups::kRingBytes + Groups::kGroups * 4 * kStagingBytes<Epilogue>;

// Matrices that an epilogue reads, as boxes of a tile's rows.
struct SideMaps {
    CUtensorMap of[2];
};
// A stage holds two of its boxes.
template <class T, class Epilogue>
__device__ int side_stages(const Epilogue &epilogue) {
    static_assert(2 * kSideBoxBytes<T> <= T::kStageBytes);
    return divide_up(epilogue.template boxes<T>(), 2);
}

// Fills the stages behind those of a product.
template <class T, class Epilogue>
__device__ void fill_side(const SideMaps &side_maps, const Epilogue &epilogue, const Stages &stages, typename T::At &at,
                          int row, int tile_column) {
    const int boxes = epilogue.template boxes<T>();
#pragma unroll 1
    for (int first = 0; first < boxes; first += 2, at.next()) {
        const uint32_t stage = stages.ring + at.stage * T::kStageBytes, barrier = stages.full + at.stage * 8;
        const int count = min(2, boxes - first);
        barrier_wait(stages.empty + at.stage * 8, at.parity ^ 1);
        barrier_expect(barrier, count * kSideBoxBytes<T>);
#pragma unroll 1
        for (int i = 0; i < count; ++i)
            copy_box(stage + i * kSideBoxBytes<T>, side_maps.of + epilogue.side_matrix(first + i), row,
                     epilogue.side_column(tile_column, first + i), barrier);
    }
}

// Lets go of stages, `at` the first of so many.
template <class T>
__device__ void release_stages(const Stages &stages, typename T::At &at, int count) {
    const int lane = threadIdx.x % 32;
    for (; count > 0; --count, at.next())
        if (lane < T::kCluster) barrier_arrive(stages.empty + at.stage * 8, lane);
}

// Stores a tile's columns of the 16 rows that this warp has summed up. Boxes that are read more than once are all there before
// the first is read, and are kept to the end.
template <class T, class Epilogue>
__device__ void finish(const Epilogue &epilogue, const float (&c)[T::n / 2], const Stages &stages, uint32_t staged,
                       typename T::At &at, int row, int tile_column, typename Epilogue::OfTile &of_tile,
                       const typename Epilogue::template Loaded<T::n> &loaded) {
    constexpr int kChunk = Epilogue::kChunk, kPassRows = Epilogue::kPassRows, kPassesOfChunk = 16 / kPassRows;
    constexpr int kPasses = (T::n + kChunk - 1) / kChunk * kPassesOfChunk;
    constexpr bool kOnce = Epilogue::kPairPerChunk;
    static_assert(kOnce || kMostHeadDim / kChunk / 2 <= T::kStages);
    typename T::At first = at;
    if constexpr (!kOnce)
        for (int stage = side_stages<T>(epilogue); stage > 0; --stage, at.next())
            barrier_wait(stages.full + at.stage * 8, at.parity);
    const int begin = tile_column, end = min(tile_column + T::n, epilogue.n);
    const int before = columns_before<T, Epilogue>(tile_column);
    tile_column -= before;
    const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
    const auto box_at = [&](int box) {
        int stage = kOnce ? at.stage : first.stage + box / 2;
        if (!kOnce && stage >= T::kStages) stage -= T::kStages;
        return stages.ring + stage * T::kStageBytes + box % 2 * kSideBoxBytes<T> + warp * 16 * kSideRowBytes;
    };
    const uint32_t own_row = staged + lane / 4 * kPitchBytes<Epilogue> + lane % 2 * 8;
    const uint32_t own = own_row + lane % 4 / 2 * 16, own_swapped = own_row + (lane % 4 / 2 ^ 1) * 16;
#pragma unroll 1
    for (int pass = 0; pass < kPasses; ++pass) {
        const int chunk = pass / kPassesOfChunk, half = pass % kPassesOfChunk;
        if (tile_column + chunk * kChunk < end) {
            // Registers have no index: each pass has code of its own here.
#pragma unroll
            for (int which = 0; which < kPasses; ++which)
                if (pass == which)
#pragma unroll
                    for (int j = 0; j < kChunk / 8; ++j) {
                        const uint32_t to = j < 4 ? own + j * 32 : own_swapped + (j * 2 ^ 2) * 16;
                        const auto bring = [&](int group) {
                            if (group < 0 || group >= T::n / 8) return;
                            const float *sums = c + group * 4 + which % kPassesOfChunk * 2;
                            store_shared(to, sums[0], sums[1]);
                            if (kPassRows == 16) store_shared(to + 8 * kPitchBytes<Epilogue>, sums[2], sums[3]);
                        };
                        const int group = which / kPassesOfChunk * (kChunk / 8) + j;
                        constexpr int kGroupsBefore = kMostBefore<T, Epilogue> / 8;
                        if (kGroupsBefore > 0 && before > 0)
                            bring(group - kGroupsBefore);
                        else
                            bring(group);
                    }
            __syncwarp();
        }
        if (kOnce && half == 0) barrier_wait(stages.full + at.stage * 8, at.parity);
        if (tile_column + chunk * kChunk < end)
            epilogue.template finish<T>(staged, box_at, row, tile_column, chunk, half, begin, end, of_tile, loaded);
        __syncwarp();
        if (kOnce && half == kPassesOfChunk - 1) release_stages<T>(stages, at, 1);
    }
    if constexpr (!kOnce) release_stages<T>(stages, first, side_stages<T>(epilogue));
}

template <class T, class Epilogue>
__device__ void consume(const Epilogue &epilogue, const Schedule &schedule, const Stages &stages,
                        uint32_t staging) {
    const int warp = warp_index() - 4;
    typename T::At at;
    for (int block = schedule.cluster<T::kCluster>(); block < schedule.blocks<T>();
         block += schedule.clusters<T::kCluster>()) {
        const auto [tile_row, tile_column, down] = schedule.place<T>(block);
        const int row = tile_row + warp * 16;
        if (warp / 4 >= schedule.strips<T>(tile_row)) {
            skip_stages<T>(stages, at, schedule.k_tiles + side_stages<T>(epilogue));
            continue;
        }
        typename Epilogue::OfTile of_tile = epilogue.load_tile(row);
        const auto loaded = epilogue.template load<T::n>(tile_column - columns_before<T, Epilogue>(tile_column));
        float c[1][T::n / 2];
        release_last<T>(stages, multiply_stages<T>(c, stages, at, warp / 4, schedule.k_tiles));
        wgmma_results(c[0]);
        epilogue.template prepare<T::n>(c[0], tile_column);
        finish<T>(epilogue, c[0], stages, staging + warp * kStagingBytes<Epilogue>, at, row, tile_column, of_tile, loaded);
    }
}

template <class Groups, class Epilogue>
__global__ void __cluster_dims__(Groups::kCluster) __launch_bounds__(kThreads<Groups>, 1)
    gemm_sm90_kernel(const __grid_constant__ Maps maps, const Operands operands, const __grid_constant__ Choices choices,
                     const __grid_constant__ SideMaps side_maps, Epilogue epilogue) {
    using Tiles = typename Groups::Tiles;
    start_next();
    const Schedule schedule(operands);
    const Stages stages = make_stages(maps, Groups::kGroups * 4 * Groups::kCluster);
    const int tile = choices.of(schedule.rows);
    cluster_wait();
    epilogue.start(schedule);
    // The roles are the two branches of one condition: what setmaxnreg asks for.
    if (threadIdx.x < 128) {
        give_registers<Groups::kCopyRegisters>();
        if (warp_index() == 0 && elect())
            Tiles::with(tile, [&](auto a_tile) {
                using T = decltype(a_tile);
                typename T::At at;
                int block = schedule.cluster<T::kCluster>(), ahead = 0;
                if (block < schedule.blocks<T>())
                    ahead = fill_ahead<T>(maps, schedule, stages, at, schedule.place<T>(block));
                wait_for_previous();
                for (; block < schedule.blocks<T>(); block += schedule.clusters<T::kCluster>(), ahead = 0) {
                    const auto place = schedule.place<T>(block);
                    fill_stages<T>(maps, schedule, stages, at, place, ahead);
                    fill_side<T>(side_maps, epilogue, stages, at, epilogue.side_row(place.row),
                                 place.column - columns_before<T, Epilogue>(place.column));
                }
                wait_until_read<T>(stages, at);
            });
    } else {
        take_registers<Groups::kRegisters>();
        wait_for_previous();
        Tiles::with(tile, [&](auto a_tile) {
            consume<decltype(a_tile)>(epilogue, schedule, stages, stages.ring + Groups::kRingBytes);
        });
    }
}

// How many clusters of four run at a time on the current device: less than a quarter of its multiprocessors, for a cluster lies
// within a part of the chip.
template <class Epilogue>
int32_t count_fours(int *clusters) {
    constexpr int kDevices = 64;
    static std::atomic<int> known[kDevices];  // and one more, for asking takes longer than all else here
    int device;
    if (const cudaError_t status = cudaGetDevice(&device)) return status;
    if (device < kDevices && known[device] > 0) {
        *clusters = known[device] - 1;
        return cudaSuccess;
    }
    const auto kernel = gemm_sm90_kernel<InFours, Epilogue>;
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {InFours::kCluster, 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = InFours::kCluster, config.blockDim = kThreads<InFours>;
    config.dynamicSmemBytes = kSharedBytes<InFours, Epilogue>;
    config.attrs = &cluster, config.numAttrs = 1;
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, config.dynamicSmemBytes);
    if (status == cudaSuccess) status = cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
    if (status == cudaSuccess && device < kDevices) known[device] = *clusters + 1;
    return status;
}

// For up to max_rows live rows; make_side(maps, box_rows) describes what the epilogue reads.
template <class Epilogue, class MakeSide>
int32_t launch(const void *a, int a_rows, const void *weight, const Operands &operands, int max_rows,
               const MakeSide &make_side, const Epilogue &epilogue, void *stream) {
    const auto choose = [&](auto groups, int clusters, int rows) {
        return decltype(groups)::Tiles::choose(rows, operands.n, divide_up(operands.k, kTileK), clusters);
    };
    const auto with = [&](auto groups, int clusters) -> int32_t {
        using Groups = decltype(groups);
        using T = typename Groups::template Of<128>;
        SideMaps side_maps;
        if (const int32_t status = make_side(side_maps, T::m)) return status;
        const Choices tiles = choices(max_rows, [&](int rows) { return choose(groups, clusters, rows).tile; });
        return launch_gemm<T, Groups::Tiles::kWidthBits>(
            gemm_sm90_kernel<Groups, Epilogue>, clusters * Groups::kCluster, kThreads<Groups>,
            kSharedBytes<Groups, Epilogue>, a, a_rows, weight, operands, tiles, stream, side_maps, epilogue);
    };
    // Many steps are as long as the longest, and others, of which less is left to compute, anything down to half of it.
    const auto cost = [&](auto groups, int clusters) {
        int64_t sum = 0;
        for (int part = 8; part <= 16; ++part)
            sum += (part == 16 ? 9 : 1) * choose(groups, clusters, divide_up(max_rows * part, 16)).cost;
        return sum;
    };
    int clusters;
    if (const int32_t status = count_pairs(&clusters)) return status;
    int in_fours;
    if (const int32_t status = count_fours<Epilogue>(&in_fours)) return status;
    const int64_t of_two = cost(Two{}, clusters), of_three = cost(Three{}, clusters);
    // Clusters of four, and tiles beside each other in clusters of two or four, count a sixteenth less for what they save in
    // copies, by measurement of down; o gains less.
    const int64_t of_four = in_fours > 0 ? cost(InFours{}, in_fours) * 15 / 16 : INT64_MAX;
    const int64_t least = std::min({of_two, of_three, of_four});
    if constexpr (Epilogue::kMayShareSlots) {
        const bool may = epilogue.shares_slots();
        const int64_t four = may && in_fours > 0 ? cost(FourBeside{}, in_fours) * 15 / 16 : INT64_MAX;
        const int64_t three = may ? cost(ThreeBeside{}, clusters) * 15 / 16 : INT64_MAX;
        if (std::min(four, three) < least)
            return three < four ? with(ThreeBeside{}, clusters) : with(FourBeside{}, in_fours);
    }
    if (of_four == least) return with(InFours{}, in_fours);
    return of_three < of_two ? with(Three{}, clusters) : with(Two{}, clusters);
}

}  // namespace

extern "C" int32_t gleaner_gemm_sm90_residual(void *scaled, void *rest, float *squares, const void *a, const void *weight,
                                              const void *bias, const void *scaled_by, const void *norm,
                                              const int32_t *rows, int32_t max_rows, int32_t n, int32_t k, void *stream) {
    const AddToStream epilogue{static_cast<bf16 *>(scaled),
                               static_cast<uint16_t *>(rest),
                               squares,
                               static_cast<const bf16 *>(scaled_by),
                               static_cast<const bf16 *>(norm),
                               static_cast<const bf16 *>(bias),
                               GLEANER_SQUARES(n),
                               n};
    const auto make_side = [&](SideMaps &maps, int box_rows) {
        // That the rest is no bf16 does not matter to a copy.
        const int32_t status = make_tensor_map(&maps.of[0], static_cast<const bf16 *>(scaled), max_rows, n, box_rows);
        return status ? status : make_tensor_map(&maps.of[1], static_cast<const bf16 *>(rest), max_rows, n, box_rows);
    };
    return launch(a, max_rows, weight, {rows, nullptr, n, k}, max_rows, make_side, epilogue, stream);
}

extern "C" int32_t gleaner_gemm_sm90_rope(void *out, const void *a, const float *squares, const void *weight,
                                          const void *bias, const void *table, const int32_t *rows,
                                          GleanerStarts starts, int32_t max_rows, int32_t a_rows, int32_t positions,
                                          int32_t n, int32_t k, int32_t head_dim, int32_t rope_columns, float eps,
                                          void *stream) {
    if (head_dim < 32 || head_dim > kMostHeadDim) return cudaErrorInvalidValue;
    const RotateHeads epilogue{static_cast<bf16 *>(out),
                               static_cast<const bf16 *>(bias),
                               row_norm(squares, k, eps),
                               starts,
                               head_dim,
                               rope_columns,
                               n};
    const auto make_side = [&](SideMaps &maps, int box_rows) {
        const int32_t status = make_tensor_map(&maps.of[0], static_cast<const float *>(table), positions, head_dim, box_rows);
        maps.of[1] = maps.of[0];
        return status;
    };
    return launch(a, a_rows, weight, {rows, starts.a, n, k}, max_rows, make_side, epilogue, stream);
}
