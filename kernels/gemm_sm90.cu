// out = epilogue(a w^T) on Hopper: the linear layers with its copy engine and warpgroup products.
//
// One CTA a multiprocessor walks over the tiles of the output, those of one weight tile after the other. Its first
// warpgroup copies: one thread fills a ring of stages of 64 columns of a and of the weight. The two others multiply, 64
// rows each, and hold the next stage in flight while they wait for the one before.
//
// A tile is 128 rows by 128, 192 or 256 columns. Wide tiles move fewer bytes a product, narrow ones fill the last wave
// better; which costs least depends on the number of live rows, so that the device chooses.
//
// Rows of a beyond the live count may hold anything: a row of a touches its own row of the product alone. They are never
// written, and tiles without a live row do not exist.
#include "epilogue.cuh"
#include "hopper.cuh"
#include "kernels.h"

namespace {

constexpr int kTileM = 128, kTileK = kBoxColumns, kBoxRows = 64;
constexpr int kBoxBytes = kBoxRows * kTileK * 2;
constexpr int kThreads = 384, kConsumerWarps = 8;
constexpr int kRingBytes = 4 * (kTileM + 256) * kTileK * 2;
constexpr int kMaxStages = 6;
constexpr int kSharedBytes = kRingBytes + 1024;  // the ring starts at a multiple of 1024

template <int kTileN>
constexpr int kStageBytes = (kTileM + kTileN) * kTileK * 2;
template <int kTileN>
constexpr int kStages = kRingBytes / kStageBytes<kTileN>;
static_assert(kStages<128> == kMaxStages);

// Columns of a tile, and what a tile costs: its columns over the share of the tensor cores' rate at which the L2 cache
// feeds it.
constexpr int kCost128 = 175, kCost192 = 218, kCost256 = 264;

struct Operands {
    const bf16 *bias;  // [n] or null
    const int32_t *rows;
    const int32_t *row_start;  // first row of a, or null for 0
    int n, k;
};

__device__ int divide_up(int a, int b) { return (a + b - 1) / b; }

// The tile width that takes the least time for so many tiles of rows.
__device__ int choose_tile(int tiles_m, int n) {
    auto time = [&](int tile_n, int cost) { return divide_up(tiles_m * divide_up(n, tile_n), gridDim.x) * cost; };
    const int narrow = time(128, kCost128), middle = time(192, kCost192), wide = time(256, kCost256);
    if (wide <= middle && wide <= narrow) return 256;
    return middle <= narrow ? 192 : 128;
}

// Where a stage's barriers are and which phase they are in.
template <int kCount>
struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    __device__ void next() {
        if (++stage == kCount) stage = 0, parity ^= 1;
    }
};

template <int kTileN>
__device__ void produce(const CUtensorMap *a_map, const CUtensorMap *weight_map, uint32_t ring, uint32_t full,
                        uint32_t empty, int tiles_m, int tiles, int k_tiles, int row_start) {
    Ring<kStages<kTileN>> at;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int m0 = row_start + tile % tiles_m * kTileM, n0 = tile / tiles_m * kTileN;
        for (int k_tile = 0; k_tile < k_tiles; ++k_tile, at.next()) {
            const uint32_t stage = ring + at.stage * kStageBytes<kTileN>, barrier = full + at.stage * 8;
            barrier_wait(empty + at.stage * 8, at.parity ^ 1);
            barrier_expect(barrier, kStageBytes<kTileN>);
#pragma unroll
            for (int box = 0; box < kTileM / kBoxRows; ++box)
                copy_box(stage + box * kBoxBytes, a_map, m0 + box * kBoxRows, k_tile * kTileK, barrier);
#pragma unroll
            for (int box = 0; box < kTileN / kBoxRows; ++box)
                copy_box(stage + kTileM * kTileK * 2 + box * kBoxBytes, weight_map, n0 + box * kBoxRows,
                         k_tile * kTileK, barrier);
        }
    }
}

template <int kTileN, class Epilogue>
__device__ void consume(const Operands &operands, const Epilogue &epilogue, uint32_t ring, uint32_t full,
                        uint32_t empty, int rows, int tiles_m, int tiles, int k_tiles) {
    const int warp = threadIdx.x / 32 - 4, lane = threadIdx.x % 32;
    const int group_offset = warp / 4 * kBoxBytes;
    Ring<kStages<kTileN>> at;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const int row = tile % tiles_m * kTileM + warp * 16 + lane / 4;
        const int first_column = tile / tiles_m * kTileN + lane % 4 * 2;
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
        for (int k_tile = 0; k_tile < k_tiles; ++k_tile, at.next()) {
            barrier_wait(full + at.stage * 8, at.parity);
            const uint32_t stage = ring + at.stage * kStageBytes<kTileN>;
            const uint64_t a = box_descriptor(stage + group_offset);
            const uint64_t weight = box_descriptor(stage + kTileM * kTileK * 2);
            wgmma_fence();
#pragma unroll
            for (int step = 0; step < kTileK / 16; ++step)
                wgmma<kTileN>(c, a + step * kDescriptorStep, weight + step * kDescriptorStep, k_tile + step);
            wgmma_commit();
            wgmma_wait<1>();
            if (k_tile > 0 && lane == 0) barrier_arrive(empty + previous * 8);
            previous = at.stage;
        }
        wgmma_wait<0>();
        if (lane == 0) barrier_arrive(empty + previous * 8);

#pragma unroll
        for (int j = 0; j < kTileN / 16; ++j) {
            const int column = first_column + j * 16;
            if (column >= operands.n) continue;
            float2 bias_low{}, bias_high{};
            if (operands.bias) {
                bias_low = unpack(*reinterpret_cast<const uint32_t *>(operands.bias + column));
                bias_high = unpack(*reinterpret_cast<const uint32_t *>(operands.bias + column + 8));
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if (row + half * 8 >= rows) continue;
                const float *low_at = c + j * 8 + half * 2, *high_at = low_at + 4;
                const float low[2] = {low_at[0] + bias_low.x, low_at[1] + bias_low.y};
                const float high[2] = {high_at[0] + bias_high.x, high_at[1] + bias_high.y};
                epilogue(row + half * 8, column, low, high, loaded[j][half]);
            }
        }
    }
}

template <class Epilogue>
__global__ void __launch_bounds__(kThreads, 1)
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
            barrier_init(empty + stage * 8, kConsumerWarps);
        }
        barrier_init_fence();
    }
    __syncthreads();

    const int rows = *operands.rows, row_start = operands.row_start ? *operands.row_start : 0;
    const int tiles_m = divide_up(rows, kTileM), k_tiles = divide_up(operands.k, kTileK);
    const int tile_n = choose_tile(tiles_m, operands.n);
    const int tiles = tiles_m * divide_up(operands.n, tile_n);

    // The roles are the two branches of one condition: what setmaxnreg asks for.
    if (threadIdx.x < 128) {
        give_registers<40>();
        if (threadIdx.x > 0) return;
        if (tile_n == 128)
            produce<128>(&a_map, &weight_map, ring, full, empty, tiles_m, tiles, k_tiles, row_start);
        else if (tile_n == 192)
            produce<192>(&a_map, &weight_map, ring, full, empty, tiles_m, tiles, k_tiles, row_start);
        else
            produce<256>(&a_map, &weight_map, ring, full, empty, tiles_m, tiles, k_tiles, row_start);
    } else {
        take_registers<232>();
        if (tile_n == 128)
            consume<128>(operands, epilogue, ring, full, empty, rows, tiles_m, tiles, k_tiles);
        else if (tile_n == 192)
            consume<192>(operands, epilogue, ring, full, empty, rows, tiles_m, tiles, k_tiles);
        else
            consume<256>(operands, epilogue, ring, full, empty, rows, tiles_m, tiles, k_tiles);
    }
}

// a holds a_rows rows, dead ones among them.
template <class Epilogue>
int32_t launch(const void *a, int a_rows, const void *weight, const Operands &operands, const Epilogue &epilogue,
               int max_rows, void *stream) {
    CUtensorMap a_map, weight_map;
    if (const int32_t status = make_tensor_map(&a_map, a, a_rows, operands.k, kBoxRows)) return status;
    if (const int32_t status = make_tensor_map(&weight_map, weight, operands.n, operands.k, kBoxRows)) return status;
    int device, multiprocessors;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess)
        status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (status == cudaSuccess)
        status = cudaFuncSetAttribute(gemm_sm90_kernel<Epilogue>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      kSharedBytes);
    if (status != cudaSuccess) return status;
    const int most_tiles = (max_rows + kTileM - 1) / kTileM * ((operands.n + 127) / 128);
    const int grid = most_tiles < multiprocessors ? most_tiles : multiprocessors;
    gemm_sm90_kernel<<<grid, kThreads, kSharedBytes, static_cast<cudaStream_t>(stream)>>>(a_map, weight_map, operands,
                                                                                           epilogue);
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
