// out = silu(gate) * up of norm(a) w^T on Hopper. The two warpgroups that multiply take whole tiles in turns, so that one
// stores while the other multiplies: what pays for a layer of many tiles and a long epilogue.
#include <type_traits>

#include "gemm_sm90.cuh"
#include "kernels.h"

namespace {

constexpr int kThreads = 384, kCluster = 2;
constexpr int kRingBytes = 200 * 1024, kSharedBytes = kRingBytes + 1024;
// Tiles of 192 columns ask less of the L2 cache, tiles of 128 share the last of the work out better: the columns on the left go
// by the former, the others by the latter. A bias takes registers that sums of wide tiles have not.
template <bool kBias>
using Wide = Tile<128, kBias ? 128 : 192, kRingBytes, kCluster>;
template <bool kBias>
using Narrow = Tile<128, 128, kRingBytes, kCluster, Wide<kBias>::n>;

// The pairs of tiles of all clusters: wide ones, then narrow ones of the columns from first_narrow on.
template <bool kBias>
struct Parts {
    using W = Wide<kBias>;
    using N = Narrow<kBias>;
    static constexpr int kStep = 2 * W::n;  // columns, what the choice is counted in
    int first_narrow, wide, all;
    __host__ __device__ Parts(int rows, int n, int choice)
        : first_narrow(choice * kStep < n ? choice * kStep : n),
          wide(Schedule::blocks<W>(rows, first_narrow)),
          all(wide + Schedule::blocks<N>(rows, n - first_narrow)) {}
    template <bool kNarrow>
    __device__ Schedule::Place place(const Schedule &schedule, int pair) const {
        return kNarrow ? schedule.place<N>(pair - wide, first_narrow) : schedule.place<W>(pair);
    }

    // What costs the cluster least that has most to do: the first of those that get one wide tile more than others, or, with
    // more narrow ones, the one behind them. Of two choices that cost the same, the one of more wide tiles.
    static int choose(int rows, int n, int k_tiles, int clusters) {
        constexpr int kTileCost = 700;  // on top
        int64_t least = INT64_MAX;
        int best = 0;
        for (int choice = 0; choice <= UINT8_MAX && choice <= divide_up(n, kStep); ++choice) {
            const Parts parts(rows, n, choice);
            const auto cost = [&](int cluster) {
                const int wide = divide_up(parts.wide - cluster, clusters), all = divide_up(parts.all - cluster, clusters);
                return cost_of<W>(wide, k_tiles, kTileCost) + cost_of<N>(all - wide, k_tiles, kTileCost);
            };
            const int64_t first = cost(0), behind = cost(parts.wide % clusters), most = first > behind ? first : behind;
            if (most <= least) least = most, best = choice;
        }
        return best;
    }
};

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

// Computes this CTA's tiles of one kind: every second one from `pair` on, for the two groups take turns over all.
template <bool kNarrow, bool kBias>
__device__ void consume(const Operands &operands, const RowNorm &norm, const SwiGlu &epilogue, const bf16 *bias,
                        const Schedule &schedule, const Parts<kBias> &parts, const Stages &stages,
                        typename Wide<kBias>::At &at, int &pair) {
    using T = std::conditional_t<kNarrow, Narrow<kBias>, Wide<kBias>>;
    constexpr int kStrips = 2;  // of 64 rows
    const int warp = warp_index() - 4, group = warp / 4, lane = threadIdx.x % 32;
    for (; pair < (kNarrow ? parts.all : parts.wide); pair += 2 * schedule.clusters<kCluster>(), at.skip(schedule.k_tiles)) {
        // A barrier tells one phase from the next, not from the one after that: stages may be waited for only when all
        // before them are there.
        if (pair >= schedule.clusters<kCluster>()) wait_for_turn(1 + group);
        float c[kStrips][T::n / 2];
        const int last = multiply_stages<T>(c, stages, at, 0, schedule.k_tiles);
        if (pair + schedule.clusters<kCluster>() < parts.all) give_turn(2 - group);
        release_last<T>(stages, last);
        const auto place = parts.template place<kNarrow>(schedule, pair);
        const int row = place.row + warp % 4 * 16 + lane / 4;
#pragma unroll
        for (int strip = 0; strip < kStrips; ++strip) {
            const int first = row + strip * 64;
            const int rows[2] = {min(first, schedule.rows - 1), min(first + 8, schedule.rows - 1)};
            float factors[2];
            norm.factors<1>(factors, rows);
            wgmma_results(c[strip]);
            finish<T::n, kBias>(operands, epilogue, bias, c[strip], factors, first, schedule.rows, place.column);
        }
    }
}

template <bool kBias>
__global__ void __cluster_dims__(kCluster) __launch_bounds__(kThreads, 1)
    gemm_swiglu_sm90_kernel(const __grid_constant__ Maps maps, const Operands operands,
                            const __grid_constant__ Choices choices, const RowNorm norm, const SwiGlu epilogue,
                            const bf16 *bias) {
    start_next();
    const Schedule schedule(operands);
    const Stages stages = make_stages(maps, 4 * kCluster);
    const Parts<kBias> parts(schedule.rows, schedule.n, choices.of(schedule.rows));
    cluster_wait();
    typename Wide<kBias>::At at;
    int pair = schedule.cluster<kCluster>();
    // The roles are the two branches of one condition: what setmaxnreg asks for.
    const int warp = warp_index();
    if (warp < 4) {
        give_registers<40>();
        if (warp == 0 && elect()) {
            int ahead = 0;
            if (pair < parts.wide)
                ahead = fill_ahead<Wide<kBias>>(maps, schedule, stages, at,
                                                parts.template place<false>(schedule, pair));
            wait_for_previous();
            for (; pair < parts.wide; pair += schedule.clusters<kCluster>(), ahead = 0)
                fill_stages<Wide<kBias>>(maps, schedule, stages, at,
                                         parts.template place<false>(schedule, pair), ahead);
            for (; pair < parts.all; pair += schedule.clusters<kCluster>())
                fill_stages<Narrow<kBias>>(maps, schedule, stages, at,
                                           parts.template place<true>(schedule, pair), 0);
            wait_until_read<Wide<kBias>>(stages, at);
        }
    } else {
        take_registers<232>();
        wait_for_previous();
        if (warp >= 8) pair += schedule.clusters<kCluster>(), at.skip(schedule.k_tiles);
        consume<false, kBias>(operands, norm, epilogue, bias, schedule, parts, stages, at, pair);
        consume<true, kBias>(operands, norm, epilogue, bias, schedule, parts, stages, at, pair);
    }
}

}  // namespace

extern "C" int32_t gleaner_gemm_sm90_swiglu(void *out, const void *a, const float *squares, const void *weight,
                                            const void *bias, const int32_t *rows, int32_t max_rows, int32_t n,
                                            int32_t k, float eps, void *stream) {
    const RowNorm norm = row_norm(squares, k, eps);
    const SwiGlu epilogue{static_cast<bf16 *>(out), n / 2};
    int clusters;
    if (const int32_t status = count_pairs(&clusters)) return status;
    const auto with = [&](auto with_bias) {
        constexpr bool kBias = decltype(with_bias)::value;
        const auto choose = [&](int rows) { return Parts<kBias>::choose(rows, n, divide_up(k, kTileK), clusters); };
        return launch_gemm<Wide<kBias>, width_bits<Wide<kBias>, Narrow<kBias>>>(
            gemm_swiglu_sm90_kernel<kBias>, clusters * kCluster, kThreads, kSharedBytes, a, max_rows, weight,
            {rows, nullptr, n, k}, choices(max_rows, choose), stream, norm, epilogue, static_cast<const bf16 *>(bias));
    };
    return bias ? with(std::true_type{}) : with(std::false_type{});
}
