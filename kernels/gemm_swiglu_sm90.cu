// out = silu(gate) * up of norm(a) w^T on Hopper. The two warpgroups that multiply take whole tiles in turns, so that one stores
// while the other multiplies: what pays for a layer of many tiles and a long epilogue.
#include <type_traits>

#include "gemm_sm90.cuh"
#include "kernels.h"

namespace {

constexpr int kTileCost = 700;  // as Menu takes it
constexpr int kThreads = 384;
constexpr int kRingBytes = 200 * 1024, kSharedBytes = kRingBytes + 1024;
// A bias takes registers that sums of wide tiles have not.
template <bool kBias>
using Tiles = std::conditional_t<kBias, Menu<kTileCost, Tile<128, 128, kRingBytes>>,
                                 Menu<kTileCost, Tile<128, 128, kRingBytes>, Tile<128, 192, kRingBytes>>>;

// Stores the two rows of a tile that this thread holds sums of, eight apart: two of each group of eight columns.
template <int kTileN, bool kBias>
__device__ void finish(const Operands &operands, const SwiGlu &epilogue, const bf16 *bias, const float (&c)[kTileN / 2],
                       const float (&factors)[2], int row, int rows, int tile_column) {
    const int lane = threadIdx.x % 32, first_column = tile_column + lane % 4 * 2;
    // Four groups of eight columns of the output at a time, each lane to store one of them.
#pragma unroll
    for (int j = 0; j < kTileN / 16; j += 4) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            uint32_t words[4];
#pragma unroll
            for (int p = 0; p < 4; ++p) {
                const int column = first_column + (j + p) * 16;
                float2 bias_low{}, bias_high{};
                if (kBias && column < operands.n) {
                    bias_low = unpack(__ldg(reinterpret_cast<const uint32_t *>(bias + column)));
                    bias_high = unpack(__ldg(reinterpret_cast<const uint32_t *>(bias + column + 8)));
                }
                const float *low_at = c + (j + p) * 8 + half * 2, *high_at = low_at + 4, factor = factors[half];
                const float low[2] = {low_at[0] * factor + bias_low.x, low_at[1] * factor + bias_low.y};
                const float high[2] = {high_at[0] * factor + bias_high.x, high_at[1] * factor + bias_high.y};
                uint32_t word[1];
                epilogue.apply(word, column, low, high, {});
                words[p] = word[0];
            }
            const uint4 group = transpose(words);
            const int column = tile_column / 2 + j * 8 + lane % 4 * 8;
            if (row + half * 8 < rows && column < epilogue.out_stride)
                *reinterpret_cast<uint4 *>(epilogue.out + static_cast<size_t>(row + half * 8) * epilogue.out_stride +
                                           column) = group;
        }
    }
}

template <class T, bool kBias>
__device__ void consume(const Operands &operands, const RowNorm &norm, const SwiGlu &epilogue, const bf16 *bias,
                        const Schedule &schedule, const Stages &stages) {
    constexpr int kStrips = 2;  // of 64 rows
    const int warp = threadIdx.x / 32 - 4, group = warp / 4, lane = threadIdx.x % 32;
    typename T::At at;
    bool own_turn = group == 0;
    for (int pair = schedule.cluster(); pair < schedule.pairs<T>(); pair += schedule.clusters(), own_turn = !own_turn) {
        if (!own_turn) {
            at.skip(schedule.k_tiles);
            continue;
        }
        // A barrier tells one phase from the next, not from the one after that: stages may be waited for only when all
        // before them are there.
        if (pair >= schedule.clusters()) wait_for_turn(1 + group);
        float c[kStrips][T::n / 2];
        const int last = multiply_stages<T>(c, stages, at, 0, schedule.k_tiles);
        if (pair + schedule.clusters() < schedule.pairs<T>()) give_turn(2 - group);
        release_last(stages, last);
        const int row = schedule.row<T>(pair) + warp % 4 * 16 + lane / 4;
#pragma unroll
        for (int strip = 0; strip < kStrips; ++strip) {
            const int first = row + strip * 64;
            const float factors[2] = {norm.factor(min(first, schedule.rows - 1)),
                                      norm.factor(min(first + 8, schedule.rows - 1))};
            wgmma_results(c[strip]);
            finish<T::n, kBias>(operands, epilogue, bias, c[strip], factors, first, schedule.rows,
                                  schedule.column<T>(pair));
        }
    }
}

template <bool kBias>
__global__ void __cluster_dims__(kCluster) __launch_bounds__(kThreads, 1)
    gemm_swiglu_sm90_kernel(const __grid_constant__ CUtensorMap a_map, const __grid_constant__ WeightMaps weight_maps,
                            const Operands operands, const RowNorm norm, const SwiGlu epilogue, const bf16 *bias) {
    const Schedule schedule(operands);
    const Stages stages = make_stages(&a_map, weight_maps, 4);
    const int tile_chosen = Tiles<kBias>::choose(schedule);
    cluster_wait();
    // The roles are the two branches of one condition: what setmaxnreg asks for.
    if (threadIdx.x < 128) {
        give_registers<40>();
        if (threadIdx.x == 0)
            Tiles<kBias>::with(tile_chosen, [&](auto tile) {
                produce<decltype(tile)>(&a_map, weight_maps, schedule, stages, [](auto &, int, int) {});
            });
    } else {
        take_registers<232>();
        Tiles<kBias>::with(tile_chosen, [&](auto tile) {
            consume<decltype(tile), kBias>(operands, norm, epilogue, bias, schedule, stages);
        });
    }
}

}  // namespace

extern "C" int32_t gleaner_gemm_sm90_swiglu(void *out, const void *a, const float *squares, const void *weight,
                                            const void *bias, const int32_t *rows, int32_t max_rows, int32_t n,
                                            int32_t k, float eps, void *stream) {
    const RowNorm norm = row_norm(squares, k, eps);
    const SwiGlu epilogue{static_cast<bf16 *>(out), n / 2};
    const auto kernel = bias ? gemm_swiglu_sm90_kernel<true> : gemm_swiglu_sm90_kernel<false>;
    int clusters;
    if (const int32_t status = count_clusters(&clusters)) return status;
    return launch_gemm(kernel, clusters, kThreads, kSharedBytes, a, max_rows, weight, {rows, nullptr, n, k}, stream, norm,
                       epilogue, static_cast<const bf16 *>(bias));
}
