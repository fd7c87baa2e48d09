// out = epilogue(a w^T) on Hopper: the linear layers with its copy engine and warpgroup products.
//
// Two CTAs on neighbouring multiprocessors, a cluster, walk together over pairs of tiles of the output: rows below each
// other, the same columns of it, so that each fetches half of the weights for both. The first warpgroup of a CTA copies:
// one thread fills a ring of stages of 64 columns of a and of the weight. The two others multiply, 64 rows each, and hold
// the next stage in flight while they wait for the one before.
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
constexpr int kThreads = 384, kConsumerWarps = 8;
constexpr int kRingBytes = 4 * (kTileM + 256) * kTileK * 2;
constexpr int kMaxStages = 6;
constexpr int kSharedBytes = kRingBytes + 1024;  // the ring starts at a multiple of 1024

template <int kTileN>
constexpr int kStageBytes = (kTileM + kTileN) * kTileK * 2;
template <int kTileN>
constexpr int kStages = kRingBytes / kStageBytes<kTileN>;
static_assert(kStages<128> == kMaxStages);

// What a tile of so many columns costs: them, and what a tile takes beside its products.
constexpr int kCost128 = 150, kCost192 = 212, kCost256 = 274;

struct Operands {
    const bf16 *bias;  // [n] or null
    const int32_t *rows;
    const int32_t *row_start;  // first row of a, or null for 0
    int n, k;
};

// The work of all clusters: pairs of tiles, those of one tile of the weight after the other.
struct Schedule {
    int rows, row_start, pairs_m, pairs, k_tiles;
    __device__ int cluster() const { return blockIdx.x / kCluster; }
    __device__ int clusters() const { return gridDim.x / kCluster; }
    __device__ int row(int pair) const { return (pair % pairs_m * kCluster + cluster_rank()) * kTileM; }
    template <int kTileN>
    __device__ int column(int pair) const {
        return pair / pairs_m * kTileN;
    }
};

// The tile width that takes the least time for so many pairs of tiles of rows.
__device__ int choose_tile(int pairs_m, int n) {
    const int clusters = gridDim.x / kCluster;
    auto time = [&](int tile_n, int cost) { return divide_up(pairs_m * divide_up(n, tile_n), clusters) * cost; };
    const int narrow = time(128, kCost128), middle = time(192, kCost192), wide = time(256, kCost256);
    if (wide <= middle && wide <= narrow) return 256;
    return middle <= narrow ? 192 : 128;
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

template <int kTileN, class Epilogue>
__device__ void consume(const Operands &operands, const Epilogue &epilogue, const Schedule &schedule, uint32_t ring,
                        uint32_t full, uint32_t empty) {
    constexpr int kWords = Epilogue::kWords;
    const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32, rows = schedule.rows;
    const int group_offset = warp / 4 * (kABytes / 2);
    Ring<kStages<kTileN>> at;
    for (int pair = schedule.cluster(); pair < schedule.pairs; pair += schedule.clusters()) {
        const int row = schedule.row(pair) + warp * 16 + lane / 4;
        const int tile_column = schedule.column<kTileN>(pair), first_column = tile_column + lane % 4 * 2;
        // What the epilogue reads is asked for now and is there when the product is.
        typename Epilogue::Loaded loaded[kTileN / 16][2];
#pragma unroll
        for (int j = 0; j < kTileN / 16; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                if (row + half * 8 < rows && first_column + j * 16 < operands.n)
                    loaded[j][half] = epilogue.load(row + half * 8, first_column + j * 16);

        float c[kTileN / 2];
        int previous = 0;
        for (int k_tile = 0; k_tile < schedule.k_tiles; ++k_tile, at.next()) {
            barrier_wait(full + at.stage * 8, at.parity);
            const uint32_t stage = ring + at.stage * kStageBytes<kTileN>;
            const uint64_t a = box_descriptor(stage + group_offset);
            const uint64_t weight = box_descriptor(stage + kABytes);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < kTileK / 16; ++step)
                wgmma<kTileN>(c, a + step * kDescriptorStep, weight + step * kDescriptorStep, k_tile + step);
            wgmma_commit();
            wgmma_wait<1>();
            if (k_tile > 0 && lane < kCluster) barrier_arrive(empty + previous * 8, lane);
            previous = at.stage;
        }
        wgmma_wait<0>();
        if (lane < kCluster) barrier_arrive(empty + previous * 8, lane);

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
                    if (operands.bias && column < operands.n) {
                        bias_low = unpack(__ldg(reinterpret_cast<const uint32_t *>(operands.bias + column)));
                        bias_high = unpack(__ldg(reinterpret_cast<const uint32_t *>(operands.bias + column + 8)));
                    }
                    const float *low_at = c + (j + p) * 8 + half * 2, *high_at = low_at + 4;
                    const float low[2] = {low_at[0] + bias_low.x, low_at[1] + bias_low.y};
                    const float high[2] = {high_at[0] + bias_high.x, high_at[1] + bias_high.y};
                    uint32_t result[kWords];
                    epilogue.apply(result, min(row + half * 8, rows - 1), column, low, high, loaded[j + p][half]);
#pragma unroll
                    for (int w = 0; w < kWords; ++w) words[p * kWords + w] = result[w];
                }
                const uint4 group = transpose(words);
                const int column = (tile_column + j * 16) * kWords / 2 + lane % 4 * 8;
                if (row + half * 8 < rows && column < operands.n * kWords / 2)
                    *reinterpret_cast<uint4 *>(epilogue.out +
                                               static_cast<size_t>(row + half * 8) * epilogue.out_stride + column) =
                        group;
            }
        }
    }
}

template <class Epilogue>
__global__ void __cluster_dims__(kCluster) __launch_bounds__(kThreads, 1)
    gemm_sm90_kernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ CUtensorMap weight_map,
                     const Operands operands, const Epilogue epilogue) {
    extern __shared__ unsigned char shared[];
    __shared__ uint64_t full_barriers[kMaxStages], empty_barriers[kMaxStages];
    const uint32_t ring = (shared_address(shared) + 1023) / 1024 * 1024;
    const uint32_t full = shared_address(full_barriers), empty = shared_address(empty_barriers);
    if (threadIdx.x == 0) {
        prefetch_map(&a_map);
        prefetch_map(&weight_map);
        for (int stage = 0; stage < kMaxStages; ++stage) {
            barrier_init(full + stage * 8, 1);
            barrier_init(empty + stage * 8, kConsumerWarps * kCluster);
        }
        barrier_init_fence();
    }
    cluster_sync();

    const int rows = *operands.rows, row_start = operands.row_start ? *operands.row_start : 0;
    const int pairs_m = divide_up(rows, kTileM * kCluster);
    const int tile_n = choose_tile(pairs_m, operands.n);
    const Schedule schedule{rows, row_start, pairs_m, pairs_m * divide_up(operands.n, tile_n),
                            divide_up(operands.k, kTileK)};

    // The roles are the two branches of one condition: what setmaxnreg asks for.
    if (threadIdx.x < 128) {
        give_registers<40>();
        if (threadIdx.x == 0) {
            if (tile_n == 128)
                produce<128>(&a_map, &weight_map, schedule, ring, full, empty);
            else if (tile_n == 192)
                produce<192>(&a_map, &weight_map, schedule, ring, full, empty);
            else
                produce<256>(&a_map, &weight_map, schedule, ring, full, empty);
        }
    } else {
        take_registers<232>();
        if (tile_n == 128)
            consume<128>(operands, epilogue, schedule, ring, full, empty);
        else if (tile_n == 192)
            consume<192>(operands, epilogue, schedule, ring, full, empty);
        else
            consume<256>(operands, epilogue, schedule, ring, full, empty);
    }
    // The other CTA may still copy to this one's memory and arrive at its barriers.
    cluster_sync();
}

// a holds a_rows rows, dead ones among them.
template <class Epilogue>
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
        status = cudaFuncSetAttribute(gemm_sm90_kernel<Epilogue>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      kSharedBytes);
    if (status != cudaSuccess) return status;
    const int pairs_m = (max_rows + kTileM * kCluster - 1) / (kTileM * kCluster);
    const int most_pairs = pairs_m * ((operands.n + 127) / 128);
    const int clusters = most_pairs < multiprocessors / kCluster ? most_pairs : multiprocessors / kCluster;
    gemm_sm90_kernel<<<clusters * kCluster, kThreads, kSharedBytes, static_cast<cudaStream_t>(stream)>>>(
        a_map, weight_map, operands, epilogue);
    return cudaGetLastError();
}

}  // namespace

extern "C" int32_t gleaner_gemm_sm90_residual(void *x, const void *a, const void *weight, const void *bias,
                                              const int32_t *rows, int32_t max_rows, int32_t n, int32_t k,
                                              void *stream) {
    const Operands operands{static_cast<const bf16 *>(bias), rows, nullptr, n, k};
    return launch(a, max_rows, weight, operands, Residual{static_cast<bf16 *>(x), n}, max_rows, stream);
}

extern "C" int32_t gleaner_gemm_sm90_swiglu(void *out, const void *a, const void *weight, const void *bias,
                                            const int32_t *rows, int32_t max_rows, int32_t n, int32_t k, void *stream) {
    const Operands operands{static_cast<const bf16 *>(bias), rows, nullptr, n, k};
    return launch(a, max_rows, weight, operands, SwiGlu{static_cast<bf16 *>(out), n / 2}, max_rows, stream);
}

extern "C" int32_t gleaner_gemm_sm90_rope(void *out, const void *a, const void *weight, const void *bias,
                                          const void *table, const int32_t *rows, const int32_t *row_start,
                                          int32_t max_rows, int32_t a_rows, int32_t n, int32_t k, int32_t head_dim,
                                          int32_t rope_columns, void *stream) {
    const Operands operands{static_cast<const bf16 *>(bias), rows, row_start, n, k};
    const Rope rope{static_cast<bf16 *>(out), static_cast<const float2 *>(table), row_start, n, head_dim, rope_columns};
    return launch(a, a_rows, weight, operands, rope, max_rows, stream);
}
