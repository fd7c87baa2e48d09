// out = epilogue(a w^T) on Hopper: the linear layers but gate and up.
//
// The warpgroups that multiply share a tile. A layer has few tiles, often one a CTA, so that everything beside the product
// shows: above all code that runs once and has to be fetched first, and waiting for what the epilogue reads. So the latter
// comes through the ring behind the last stage of the product; a warp brings its sums through shared memory, 32 columns at a
// time; and what follows is one short loop over rows of them.
#include <algorithm>
#include <atomic>

#include "gemm_epilogues_sm90.cuh"

namespace {

constexpr int kTileCost = 400;  // as Menu takes it

// Warpgroups that multiply, 64 rows of a tile each, and what that leaves them: registers, and memory for stages; and the CTAs
// of a cluster. Clusters of four fetch less, and leave a few multiprocessors without work.
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
    using Of = Tile<192, kColumns, kRingBytes, kCluster>;
    using Tiles = Menu<kTileCost, Of<128>, Of<192>, Of<160>>;
};
template <class Groups>
constexpr int kThreads = (Groups::kGroups + 1) * 128;
template <class Groups>
constexpr int kSharedBytes = 1024 + Groups::kRingBytes + Groups::kGroups * 4 * kStagingBytes;

// What an epilogue reads comes in boxes of a chunk's columns, so many in a stage.
template <class T>
constexpr int kBoxesOfStage = T::kStageBytes / (T::m * kSideRowBytes);
template <class T, class Epilogue>
__device__ int side_stages(const Epilogue &epilogue) {
    return divide_up(epilogue.boxes(kChunksOf<T>), kBoxesOfStage<T>);
}

// Fills the stages behind those of a product.
template <class T, class Epilogue>
__device__ void fill_side(const CUtensorMap *side_map, const Epilogue &epilogue, const Stages &stages,
                          typename T::At &at, int row, int tile_column) {
    constexpr int kEach = kBoxesOfStage<T>, kBoxBytes = T::m * kSideRowBytes;
    const int boxes = epilogue.boxes(kChunksOf<T>);
#pragma unroll 1
    for (int first = 0; first < boxes; first += kEach, at.next()) {
        const uint32_t stage = stages.ring + at.stage * T::kStageBytes, barrier = stages.full + at.stage * 8;
        const int count = min(kEach, boxes - first);
        barrier_wait(stages.empty + at.stage * 8, at.parity ^ 1);
        barrier_expect(barrier, count * kBoxBytes);
#pragma unroll 1
        for (int box = 0; box < count; ++box)
            copy_box(stage + box * kBoxBytes, side_map, row, epilogue.side_column(tile_column, first + box), barrier);
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
    constexpr int kChunks = kChunksOf<T>, kEach = kBoxesOfStage<T>;
    constexpr bool kOnce = Epilogue::kBoxPerChunk;
    static_assert(kOnce || (kMostHeadDim / kChunk + kEach - 1) / kEach <= T::kStages);
    typename T::At first = at;
    if constexpr (!kOnce)
        for (int stage = side_stages<T>(epilogue); stage > 0; --stage, at.next())
            barrier_wait(stages.full + at.stage * 8, at.parity);
    const int end = min(tile_column + T::n, epilogue.n);
    const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
    const uint32_t own = staged + lane / 4 * kPitchBytes + lane % 4 * 8;
#pragma unroll 1
    for (int chunk = 0; chunk < kChunks; ++chunk) {
        // Registers have no index: each chunk has code of its own here.
#pragma unroll
        for (int which = 0; which < kChunks; ++which)
            if (chunk == which)
#pragma unroll
                for (int j = 0; j < kChunk / 8; ++j) {
                    const float *sums = c + which * (kChunk / 2) + j * 4;
                    store_shared(own + j * 32, sums[0], sums[1]);
                    store_shared(own + 8 * kPitchBytes + j * 32, sums[2], sums[3]);
                }
        __syncwarp();
        if (kOnce && chunk % kEach == 0) barrier_wait(stages.full + at.stage * 8, at.parity);
        const int box = epilogue.box_of(tile_column, chunk);
        int stage = kOnce ? at.stage : first.stage + box / kEach;
        if (!kOnce && stage >= T::kStages) stage -= T::kStages;
        const uint32_t side = stages.ring + stage * T::kStageBytes + box % kEach * (T::m * kSideRowBytes);
        if (tile_column + chunk * kChunk < end)
            epilogue.template finish<T::n>(staged, side + warp * 16 * kSideRowBytes, row, tile_column, chunk, end, of_tile,
                                           loaded);
        __syncwarp();
        if (kOnce && (chunk % kEach == kEach - 1 || chunk == kChunks - 1)) release_stages<T>(stages, at, 1);
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
        const auto loaded = epilogue.template load<T::n>(tile_column);
        float c[1][T::n / 2];
        release_last<T>(stages, multiply_stages<T>(c, stages, at, warp / 4, schedule.k_tiles));
        wgmma_results(c[0]);
        finish<T>(epilogue, c[0], stages, staging + warp * kStagingBytes, at, row, tile_column, of_tile, loaded);
    }
}

template <class Groups, class Epilogue>
__global__ void __cluster_dims__(Groups::kCluster) __launch_bounds__(kThreads<Groups>, 1)
    gemm_sm90_kernel(const __grid_constant__ Maps maps, const Operands operands, const __grid_constant__ Choices choices,
                     const __grid_constant__ CUtensorMap side_map, Epilogue epilogue) {
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
                    fill_side<T>(&side_map, epilogue, stages, at, epilogue.side_row(place.row), place.column);
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
    config.gridDim = InFours::kCluster, config.blockDim = kThreads<InFours>, config.dynamicSmemBytes = kSharedBytes<InFours>;
    config.attrs = &cluster, config.numAttrs = 1;
    cudaError_t status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes<InFours>);
    if (status == cudaSuccess) status = cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
    if (status == cudaSuccess && device < kDevices) known[device] = *clusters + 1;
    return status;
}

// For up to max_rows live rows; `side` is [side_rows, side_columns].
template <class Epilogue>
int32_t launch(const void *a, int a_rows, const void *weight, const Operands &operands, int max_rows, const float *side,
               int side_rows, int side_columns, const Epilogue &epilogue, void *stream) {
    const auto choose = [&](auto groups, int clusters, int rows) {
        return decltype(groups)::Tiles::choose(rows, operands.n, divide_up(operands.k, kTileK), clusters);
    };
    const auto with = [&](auto groups, int clusters) -> int32_t {
        using Groups = decltype(groups);
        using T = typename Groups::template Of<128>;
        CUtensorMap side_map;
        if (const int32_t status = make_tensor_map(&side_map, side, side_rows, side_columns, T::m)) return status;
        constexpr int kWidthCount = Groups::Tiles::kWidthCount;
        const Choices tiles = choices(max_rows, [&](int rows) { return choose(groups, clusters, rows).tile; });
        return launch_gemm<T, kWidthCount>(gemm_sm90_kernel<Groups, Epilogue>, clusters * Groups::kCluster, kThreads<Groups>,
                                           kSharedBytes<Groups>, a, a_rows, weight, operands, tiles, stream, side_map,
                                           epilogue);
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
    const int64_t of_two = cost(Two{}, clusters), of_three = cost(Three{}, clusters);
    int in_fours;
    if (const int32_t status = count_fours<Epilogue>(&in_fours)) return status;
    // What they save in copies is worth a sixteenth at least, by measurement of o and down.
    if (in_fours > 0 && cost(InFours{}, in_fours) * 15 / 16 < std::min(of_two, of_three))
        return with(InFours{}, in_fours);
    return of_three < of_two ? with(Three{}, clusters) : with(Two{}, clusters);
}

}  // namespace

extern "C" int32_t gleaner_gemm_sm90_residual(float *x, void *scaled, float *squares, const void *a, const void *weight,
                                              const void *bias, const void *norm, const int32_t *rows,
                                              int32_t max_rows, int32_t n, int32_t k, void *stream) {
    const AddToStream epilogue{x,
                               static_cast<bf16 *>(scaled),
                               squares,
                               static_cast<const bf16 *>(norm),
                               static_cast<const bf16 *>(bias),
                               GLEANER_SQUARES(n),
                               n};
    return launch(a, max_rows, weight, {rows, nullptr, n, k}, max_rows, x, max_rows, n, epilogue, stream);
}

extern "C" int32_t gleaner_gemm_sm90_rope(void *out, const void *a, const float *squares, const void *weight,
                                          const void *bias, const void *table, const int32_t *rows,
                                          GleanerStarts starts, int32_t max_rows, int32_t a_rows, int32_t positions,
                                          int32_t n, int32_t k, int32_t head_dim, int32_t rope_columns, float eps,
                                          void *stream) {
    if (head_dim < kChunk || head_dim > kMostHeadDim) return cudaErrorInvalidValue;
    const RotateHeads epilogue{static_cast<bf16 *>(out),
                               static_cast<const bf16 *>(bias),
                               row_norm(squares, k, eps),
                               starts,
                               head_dim,
                               rope_columns,
                               n};
    return launch(a, a_rows, weight, {rows, starts.a, n, k}, max_rows, static_cast<const float *>(table), positions,
                  head_dim, epilogue, stream);
}
