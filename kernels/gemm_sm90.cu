// out = epilogue(a w^T) on Hopper: the linear layers but gate and up.
//
// The warpgroups that multiply share a tile. A layer has few tiles, often one a CTA, so that everything beside the product
// shows: above all code that runs once and has to be fetched first, and waiting for what the epilogue reads. So the latter
// comes through the ring behind the last stage of the product; a warp brings its sums through shared memory, 32 columns at a
// time; and what follows is one short loop over rows of them.
#include <algorithm>
#include <atomic>
#include <type_traits>

#include "gemm_sm90.cuh"
#include "kernels.h"

namespace {

// Where a warp's sums are turned from the order of the tensor cores into rows: 16 of 32 columns, padded so that the writes of
// a quarter of a warp meet no bank twice.
constexpr int kChunk = 32, kPitchBytes = (kChunk + 8) * 4, kStagingBytes = 16 * kPitchBytes;
// What an epilogue reads is a matrix of fp32, a chunk of columns of which lies in rows of so many bytes.
constexpr int kSideRowBytes = kChunk * 4;
template <class T>
constexpr int kChunksOf = T::n / kChunk;
template <class T>
constexpr int kChunksOfStage = T::kStageBytes / (T::m * kSideRowBytes);

constexpr int kTileCost = 400;  // as Menu takes it

// Warpgroups that multiply, 64 rows of a tile each, and what that leaves them: registers, and memory for stages; and the CTAs
// of a cluster. Clusters of four fetch less, and leave a few multiprocessors without work.
struct Two {
    static constexpr int kGroups = 2, kCluster = 2, kRingBytes = 200 * 1024, kRegisters = 232, kCopyRegisters = 40;
    template <int kColumns>
    using Of = Tile<128, kColumns, kRingBytes, kCluster>;
    template <class Epilogue>
    using Tiles = typename Epilogue::TilesOfTwo;
};
struct InFours {
    static constexpr int kGroups = 2, kCluster = 4, kRingBytes = Two::kRingBytes, kRegisters = Two::kRegisters,
                         kCopyRegisters = Two::kCopyRegisters;
    template <int kColumns>
    using Of = Tile<128, kColumns, kRingBytes, kCluster>;
    template <class Epilogue>
    using Tiles = typename Epilogue::TilesInFours;
};
struct Three {
    static constexpr int kGroups = 3, kCluster = 2, kRingBytes = 192 * 1024, kRegisters = 160, kCopyRegisters = 32;
    template <int kColumns>
    using Of = Tile<192, kColumns, kRingBytes, kCluster>;
    template <class Epilogue>
    using Tiles = typename Epilogue::TilesOfThree;
};
template <class Groups>
constexpr int kThreads = (Groups::kGroups + 1) * 128;
template <class Groups>
constexpr int kSharedBytes = 1024 + Groups::kRingBytes + Groups::kGroups * 4 * kStagingBytes;

__device__ inline float4 load_shared(uint32_t address) {
    float4 v;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address));
    return v;
}

__device__ inline void store_shared(uint32_t address, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}

// A value for each of a tile's columns: a lane holds those of two columns, of each 64. Loaded before the product.
template <int kColumns>
struct OfColumns {
    static constexpr int kWords = (kColumns + 63) / 64;
    uint32_t words[kWords];
    // From `from` [n], or zeros if that is null.
    __device__ OfColumns(const bf16 *from, int tile_column, int n) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            const int column = min(tile_column + i * 64 + static_cast<int>(threadIdx.x) % 32 * 2, n - 2);
            words[i] = from ? __ldg(reinterpret_cast<const uint32_t *>(from + column)) : 0;
        }
    }
    // Those of four columns from the tile's column `at` on. All lanes ask at once, with the same at / 64.
    __device__ float4 four(int at) const {
        uint32_t word = words[0];
#pragma unroll
        for (int i = 1; i < kWords; ++i)
            if (at >= i * 64) word = words[i];
        const float2 low = unpack(__shfl_sync(0xffffffffu, word, at % 64 / 2));
        const float2 high = unpack(__shfl_sync(0xffffffffu, word, at % 64 / 2 + 1));
        return {low.x, low.y, high.x, high.y};
    }
};

__device__ inline uint2 pack_four(float4 v) { return {pack(v.x, v.y), pack(v.z, v.w)}; }

// Of two neighbouring lanes with an a and a b each, the even one gets both a, the odd one both b: to be stored as one, for the
// cost of a store is that of the rows it touches.
__device__ inline uint4 exchange(uint2 a, uint2 b) {
    const bool odd = threadIdx.x & 1;
    const uint32_t x = __shfl_xor_sync(0xffffffffu, odd ? a.x : b.x, 1);
    const uint32_t y = __shfl_xor_sync(0xffffffffu, odd ? a.y : b.y, 1);
    return odd ? uint4{x, y, b.x, b.y} : uint4{a.x, a.y, x, y};
}

// Lane i of four neighbours gets the sum of their values i.
__device__ inline float sum_of_quad(const float (&values)[4]) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
    const float low = (odd ? values[1] : values[0]) + __shfl_xor_sync(0xffffffffu, odd ? values[0] : values[1], 1);
    const float high = (odd ? values[3] : values[2]) + __shfl_xor_sync(0xffffffffu, odd ? values[2] : values[3], 1);
    return (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, 2);
}

// a * factor + b
__device__ inline float4 scaled_sum(float4 a, float factor, float4 b) {
    return {a.x * factor + b.x, a.y * factor + b.y, a.z * factor + b.z, a.w * factor + b.w};
}

// Piece `piece` of 16 bytes of a row of a box.
__device__ inline float4 load_side(uint32_t box, int row, int piece) {
    return load_shared(box + row * kSideRowBytes + (piece ^ row % 8) * 16);
}

// Where a row starts. Neither number is negative, which saves a register each.
__device__ inline size_t start_of(int row, int width) {
    return static_cast<size_t>(static_cast<uint32_t>(row)) * static_cast<uint32_t>(width);
}

// An epilogue is for the 16 rows of a warp from `row` on, of which each thread has some. `staged` is where the sums of a chunk
// lie, `side` where what belongs to them does. Columns from `end` on are nobody's.

// Eight threads a row, with four columns each. Squares are summed by chunk, whatever the tile: else a row's sum, and all that
// becomes of it, would depend in its last bits on the tile, and so on the number of rows.
struct AddToStream {
    using TilesOfTwo = Menu<kTileCost, Two::Of<128>, Two::Of<192>, Two::Of<160>, Two::Of<256>>;
    using TilesInFours = Menu<kTileCost, InFours::Of<128>, InFours::Of<192>>;
    using TilesOfThree = Menu<kTileCost, Three::Of<128>, Three::Of<192>, Three::Of<160>>;
    float *x;
    bf16 *scaled;
    float *squares;
    const bf16 *norm, *bias;
    int slots, n, rows = 0;
    struct OfTile {
        uint2 scaled[4];  // of the chunk before, if that had an even number
    };
    template <int kColumns>
    struct Loaded {
        OfColumns<kColumns> norm, bias;
    };
    __device__ void start(const Schedule &schedule) { rows = schedule.rows; }
    __device__ static int row_of(int i) { return threadIdx.x % 32 / 8 + i * 4; }
    __device__ OfTile load_tile(int) const { return {}; }
    template <int kColumns>
    __device__ Loaded<kColumns> load(int tile_column) const {
        return {{norm, tile_column, n}, {bias, tile_column, n}};
    }
    template <int kColumns>
    __device__ void finish(uint32_t staged, uint32_t side, int row, int tile_column, int chunk, int end, OfTile &of_tile,
                           const Loaded<kColumns> &loaded) const {
        const int part = threadIdx.x % 8, in_tile = chunk * kChunk + part * 4, column = tile_column + in_tile;
        const float4 weights = loaded.norm.four(in_tile);
        float4 sums[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] = load_shared(staged + row_of(i) * kPitchBytes + part * 16);
        if (bias) {
            const float4 bias_four = loaded.bias.four(in_tile);
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[i] = scaled_sum(sums[i], 1.f, bias_four);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] = scaled_sum(load_side(side, row_of(i), part), 1.f, sums[i]);
        const bool inside = column < end, even = chunk % 2 == 0;
        uint2 own[4];
        float squares_of[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float4 sum = sums[i];
            if (inside && row + row_of(i) < rows)
                *reinterpret_cast<float4 *>(x + start_of(row + row_of(i), n) + column) = sum;
            own[i] = pack_four({sum.x * weights.x, sum.y * weights.y, sum.z * weights.z, sum.w * weights.w});
            squares_of[i] = inside ? sum.x * sum.x + sum.y * sum.y + (sum.z * sum.z + sum.w * sum.w) : 0.f;
            if (even) of_tile.scaled[i] = own[i];
        }
        static_assert(kSlotColumns == kChunk);
        const int square_row = row + row_of(part % 4);
        float square = sum_of_quad(squares_of);
        square += __shfl_xor_sync(0xffffffffu, square, 4);
        if (part < 4 && square_row < rows)
            squares[start_of(square_row, slots) + (tile_column + chunk * kChunk) / kSlotColumns] = square;
        // Two chunks of `scaled` make whole lines. A last one without a second has no columns for the odd lanes.
        if (even && tile_column + (chunk + 1) * kChunk < end) return;
        const int pair_column = tile_column + chunk / 2 * (2 * kChunk) + part / 2 * 8 + part % 2 * kChunk;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const uint4 group = exchange(of_tile.scaled[i], own[i]);
            if (pair_column < end && row + row_of(i) < rows)
                *reinterpret_cast<uint4 *>(scaled + start_of(row + row_of(i), n) + pair_column) = group;
        }
    }
    __device__ int side_row(int row) const { return row; }
    __device__ int side_column(int chunk_column) const { return chunk_column; }
};

// Four threads a row, two rows each, eight apart. Of them a thread has four columns, and the four that lie eight further.
__device__ inline int quad_row(int i) { return threadIdx.x % 32 / 4 + i * 8; }
__device__ inline int quad_column(int chunk_column) {
    return chunk_column + static_cast<int>(threadIdx.x) % 4 / 2 * 16 + static_cast<int>(threadIdx.x) % 2 * 4;
}
struct QuadSums {
    float4 low, high;
};
__device__ inline QuadSums quad_sums(uint32_t staged, int i, float factor, const QuadSums &bias) {
    const uint32_t at = staged + quad_row(i) * kPitchBytes + quad_column(0) * 4;
    return {scaled_sum(load_shared(at), factor, bias.low), scaled_sum(load_shared(at + 32), factor, bias.high)};
}

// Heads in the columns below rope_columns are rotated by angles that come as cosines and sines by turns, [positions,
// head_dim].
struct RotateHeads {
    using TilesOfTwo = Menu<kTileCost, Two::Of<128>, Two::Of<192>, Two::Of<160>, Two::Of<256>>;
    using TilesInFours = void;  // not measured for these layers, which have more columns
    using TilesOfThree = Menu<kTileCost, Three::Of<128>, Three::Of<192>, Three::Of<160>>;
    bf16 *out;
    const bf16 *bias;
    RowNorm norm;
    GleanerStarts starts;
    int head_dim, rope_columns, n, rows = 0, row_start = 0, position_start = 0, out_start = 0;
    struct OfTile {
        float factors[2];
    };
    template <int kColumns>
    using Loaded = OfColumns<kColumns>;
    __device__ void start(const Schedule &schedule) {
        rows = schedule.rows, row_start = schedule.row_start;
        position_start = start_of_rows(starts.position), out_start = start_of_rows(starts.out);
    }
    __device__ OfTile load_tile(int row) const {
        OfTile of_tile;
#pragma unroll
        for (int i = 0; i < 2; ++i) of_tile.factors[i] = norm.factor(row_start + min(row + quad_row(i), rows - 1));
        return of_tile;
    }
    template <int kColumns>
    __device__ Loaded<kColumns> load(int tile_column) const {
        return {bias, tile_column, n};
    }
    template <int kColumns>
    __device__ void finish(uint32_t staged, uint32_t side, int row, int tile_column, int chunk, int end, OfTile &of_tile,
                           const Loaded<kColumns> &of_bias) const {
        const int in_tile = quad_column(chunk * kChunk), column = tile_column + in_tile, piece = threadIdx.x % 4 * 2;
        const int group_column = tile_column + chunk * kChunk + static_cast<int>(threadIdx.x) % 4 * 8;
        const QuadSums bias_sums{of_bias.four(in_tile), of_bias.four(in_tile + 8)};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const auto [low, high] = quad_sums(staged, i, of_tile.factors[i], bias_sums);
            float4 a = load_side(side, quad_row(i), piece), b = load_side(side, quad_row(i), piece + 1);
            if (column >= rope_columns) a = b = {1.f, 0.f, 1.f, 0.f};
            const uint4 group = exchange(pack_four({low.x * a.x - high.x * a.y, low.y * a.z - high.y * a.w,
                                                    low.z * b.x - high.z * b.y, low.w * b.z - high.w * b.w}),
                                         pack_four({high.x * a.x + low.x * a.y, high.y * a.z + low.y * a.w,
                                                    high.z * b.x + low.z * b.y, high.w * b.z + low.w * b.w}));
            if (row + quad_row(i) < rows && group_column < end)
                *reinterpret_cast<uint4 *>(out + start_of(out_start + row + quad_row(i), n) + group_column) = group;
        }
    }
    __device__ int side_row(int row) const { return position_start + row; }
    __device__ int side_column(int chunk_column) const { return chunk_column & (head_dim - 1); }
};

// Fills the stages behind those of a product.
template <class T, class Epilogue>
__device__ void fill_side(const CUtensorMap *side_map, const Epilogue &epilogue, const Stages &stages,
                          typename T::At &at, int row, int tile_column) {
    constexpr int kChunks = kChunksOf<T>, kEach = kChunksOfStage<T>, kBoxBytes = T::m * kSideRowBytes;
#pragma unroll 1
    for (int first = 0; first < kChunks; first += kEach, at.next()) {
        const uint32_t stage = stages.ring + at.stage * T::kStageBytes, barrier = stages.full + at.stage * 8;
        const int chunks = min(kEach, kChunks - first);
        barrier_wait(stages.empty + at.stage * 8, at.parity ^ 1);
        barrier_expect(barrier, chunks * kBoxBytes);
#pragma unroll 1
        for (int chunk = 0; chunk < chunks; ++chunk)
            copy_box(stage + chunk * kBoxBytes, side_map, row, epilogue.side_column(tile_column + (first + chunk) * kChunk),
                     barrier);
    }
}

// Stores a tile's columns of the 16 rows that this warp has summed up.
template <class T, class Epilogue>
__device__ void finish(const Epilogue &epilogue, const float (&c)[T::n / 2], const Stages &stages, uint32_t staged,
                       typename T::At &at, int row, int tile_column, typename Epilogue::OfTile &of_tile,
                       const typename Epilogue::template Loaded<T::n> &loaded) {
    constexpr int kChunks = kChunksOf<T>, kEach = kChunksOfStage<T>;
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
        if (chunk % kEach == 0) barrier_wait(stages.full + at.stage * 8, at.parity);
        const uint32_t side = stages.ring + at.stage * T::kStageBytes + chunk % kEach * (T::m * kSideRowBytes);
        if (tile_column + chunk * kChunk < end)
            epilogue.template finish<T::n>(staged, side + warp * 16 * kSideRowBytes, row, tile_column, chunk, end, of_tile,
                                           loaded);
        __syncwarp();
        if (chunk % kEach < kEach - 1 && chunk < kChunks - 1) continue;
        if (lane < T::kCluster) barrier_arrive(stages.empty + at.stage * 8, lane);
        at.next();
    }
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
            skip_stages<T>(stages, at, schedule.k_tiles + divide_up(kChunksOf<T>, kChunksOfStage<T>));
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
    using Tiles = typename Groups::template Tiles<Epilogue>;
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
        using Tiles = typename decltype(groups)::template Tiles<Epilogue>;
        return Tiles::choose(rows, operands.n, divide_up(operands.k, kTileK), clusters);
    };
    const auto with = [&](auto groups, int clusters) -> int32_t {
        using Groups = decltype(groups);
        using T = typename Groups::template Of<128>;
        CUtensorMap side_map;
        if (const int32_t status = make_tensor_map(&side_map, side, side_rows, side_columns, T::m)) return status;
        constexpr int kWidthCount = Groups::template Tiles<Epilogue>::kWidthCount;
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
    if constexpr (!std::is_void_v<typename Epilogue::TilesInFours>) {
        int in_fours;
        if (const int32_t status = count_fours<Epilogue>(&in_fours)) return status;
        // What they save in copies is worth a sixteenth at least, by measurement.
        if (in_fours > 0 && cost(InFours{}, in_fours) * 15 / 16 < std::min(of_two, of_three))
            return with(InFours{}, in_fours);
    }
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
