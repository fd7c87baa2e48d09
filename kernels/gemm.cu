// out = epilogue(a w^T): the linear layers, on the tensor cores of sm_80.
//
// A CTA makes a tile of 128 x 128 with 8 warps of 64 x 32 each; both operands come through a ring of four stages of 32
// columns, filled by asynchronous copies. A stage holds rows of 64 bytes as four 16-byte pieces; piece p of row r lies in
// slot p ^ (r / 2 % 4), so that the eight rows that one ldmatrix reads lie in different banks.
//
// Rows at and beyond the live count are read as zeros and never written; CTAs without a live row end at once.
#include <type_traits>

#include "common.cuh"
#include "epilogue.cuh"
#include "kernels.h"

namespace {

constexpr int kTileM = 128, kTileN = 128, kTileK = 32;
constexpr int kStages = 4;
constexpr int kThreads = 256;
constexpr int kWarpM = 64, kWarpN = 32;
constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;
constexpr int kStageBytes = (kTileM + kTileN) * kTileK * 2;
constexpr int kSharedBytes = kStages * kStageBytes;

struct Operands {
    const bf16 *a;       // [*, k]
    const bf16 *weight;  // [n, k]
    const bf16 *bias;    // [n] or null
    const int32_t *rows;
    const int32_t *row_start;  // first row of a, or null for 0
    const int32_t *out_start;  // first row of what comes out, or null for 0
    RowNorm norm;              // for all but Residual
    int n, k;
};

__device__ uint32_t slot(int row, int piece) { return row * (kTileK * 2) + ((piece ^ (row / 2 % 4)) * 16); }

template <class Epilogue>
__global__ void __launch_bounds__(kThreads, 2) gemm_kernel(Operands operands, Epilogue epilogue) {
    const int rows = *operands.rows;
    const int m0 = blockIdx.y * kTileM, n0 = blockIdx.x * kTileN;
    if (m0 >= rows) return;
    extern __shared__ __align__(128) unsigned char shared[];
    const uint32_t base = shared_address(shared);
    const int k = operands.k, n = operands.n;
    const int row_start = start_of_rows(operands.row_start), out_start = start_of_rows(operands.out_start);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

    // Each thread copies two pieces of a and two of the weight per stage.
    const int copy_row = threadIdx.x / 4, copy_piece = threadIdx.x % 4;
    auto load_stage = [&](int tile) {
        const uint32_t stage = base + tile % kStages * kStageBytes;
        const int column = tile * kTileK + copy_piece * 8;
        for (int half = 0; half < 2; ++half) {
            const int row = copy_row + half * 64;
            const bool a_valid = m0 + row < rows && column < k;
            const bool w_valid = n0 + row < n && column < k;
            const bf16 *a = operands.a + static_cast<size_t>(row_start + m0 + row) * k + column;
            const bf16 *w = operands.weight + static_cast<size_t>(n0 + row) * k + column;
            copy_async(stage + slot(row, copy_piece), a_valid ? a : operands.a, a_valid);
            copy_async(stage + kTileM * kTileK * 2 + slot(row, copy_piece), w_valid ? w : operands.weight, w_valid);
        }
    };

    const int tiles = (k + kTileK - 1) / kTileK;
    for (int tile = 0; tile < kStages - 1; ++tile) {
        if (tile < tiles) load_stage(tile);
        copy_commit();
    }

    float c[kFragmentsM][kFragmentsN][4] = {};
    const int warp_m = warp / 4 * kWarpM, warp_n = warp % 4 * kWarpN;
    for (int tile = 0; tile < tiles; ++tile) {
        copy_wait<kStages - 2>();
        __syncthreads();
        // The stage that is filled now was read in the round before; the barrier above ended that round.
        if (tile + kStages - 1 < tiles) load_stage(tile + kStages - 1);
        copy_commit();
        const uint32_t stage_a = base + tile % kStages * kStageBytes;
        const uint32_t stage_w = stage_a + kTileM * kTileK * 2;
        for (int step = 0; step < kTileK / 16; ++step) {
            uint32_t a[kFragmentsM][4], w[kFragmentsN / 2][4];
#pragma unroll
            for (int i = 0; i < kFragmentsM; ++i)
                load_matrices(a[i], stage_a + slot(warp_m + i * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
            for (int j = 0; j < kFragmentsN / 2; ++j)
                load_matrices(w[j], stage_w + slot(warp_n + j * 16 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
#pragma unroll
            for (int i = 0; i < kFragmentsM; ++i)
#pragma unroll
                for (int j = 0; j < kFragmentsN; ++j) mma(c[i][j], a[i], w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]);
        }
    }
    copy_wait<0>();

    constexpr int kRows = kFragmentsM * 2;  // of a lane
    constexpr bool kResidual = std::is_same_v<Epilogue, Residual>;
    auto row_of = [&](int i) { return m0 + warp_m + i * 8 + lane / 4; };
    [[maybe_unused]] float factors[kRows], squares[kRows] = {};
    if constexpr (!kResidual) {
        int of[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i) of[i] = row_start + min(row_of(i), rows - 1);
        operands.norm.factors<1>(factors, of);
    }
#pragma unroll
    for (int j = 0; j < kFragmentsN; j += 2) {
        const int column = n0 + warp_n + j * 8 + lane % 4 * 2;
        if (column >= n) continue;
        float2 bias_low{}, bias_high{};
        if (operands.bias) {
            bias_low = unpack(*reinterpret_cast<const uint32_t *>(operands.bias + column));
            bias_high = unpack(*reinterpret_cast<const uint32_t *>(operands.bias + column + 8));
        }
        // Asked for before anything is written, or each load would wait for the stores before it.
        typename Epilogue::Loaded loaded[kRows];
#pragma unroll
        for (int i = 0; i < kRows; ++i)
            if (row_of(i) < rows) loaded[i] = epilogue.load(row_of(i), column);
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int row = row_of(i);
            if (row >= rows) continue;
            float *low_at = c[i / 2][j] + i % 2 * 2, *high_at = c[i / 2][j + 1] + i % 2 * 2;
            if constexpr (!kResidual) {
                low_at[0] *= factors[i], low_at[1] *= factors[i];
                high_at[0] *= factors[i], high_at[1] *= factors[i];
            }
            const float low[2] = {low_at[0] + bias_low.x, low_at[1] + bias_low.y};
            const float high[2] = {high_at[0] + bias_high.x, high_at[1] + bias_high.y};
            uint32_t words[Epilogue::kWords];
            if constexpr (kResidual) {
                const auto sum = epilogue.add(low, high, loaded[i], column);
                epilogue.apply(words, row, column, sum);
                squares[i] += epilogue.square(sum);
            } else {
                epilogue.apply(words, column, low, high, loaded[i]);
            }
            store(epilogue, out_start + row, column, words);
        }
    }
    static_assert(kWarpN == kSlotColumns, "a warp has what belongs to a slot");
    if constexpr (kResidual)
        for (int i = 0; i < kRows; ++i)
            epilogue.store_square(row_of(i), n0 + warp_n, squares[i], row_of(i) < rows);
}

template <class Epilogue>
int32_t launch(const Operands &operands, const Epilogue &epilogue, int max_rows, void *stream) {
    const cudaError_t status =
        cudaFuncSetAttribute(gemm_kernel<Epilogue>, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
    if (status != cudaSuccess) return status;
    const dim3 grid((operands.n + kTileN - 1) / kTileN, (max_rows + kTileM - 1) / kTileM);
    gemm_kernel<Epilogue><<<grid, kThreads, kSharedBytes, static_cast<cudaStream_t>(stream)>>>(operands, epilogue);
    return cudaGetLastError();
}

Operands operands_of(const void *a, const void *weight, const void *bias, const int32_t *rows, const GleanerStarts &starts,
                     const RowNorm &norm, int32_t n, int32_t k) {
    return {static_cast<const bf16 *>(a), static_cast<const bf16 *>(weight), static_cast<const bf16 *>(bias), rows,
            starts.a, starts.out, norm, n, k};
}

}  // namespace

extern "C" int32_t gleaner_gemm_residual(void *scaled, void *rest, float *squares, const void *a, const void *weight,
                                         const void *bias, const void *scaled_by, const void *norm, const int32_t *rows,
                                         int32_t max_rows, int32_t n, int32_t k, void *stream) {
    const Residual residual{static_cast<bf16 *>(scaled),
                            static_cast<uint16_t *>(rest),
                            squares,
                            static_cast<const bf16 *>(scaled_by),
                            static_cast<const bf16 *>(norm),
                            n,
                            GLEANER_SQUARES(n)};
    return launch(operands_of(a, weight, bias, rows, {}, {}, n, k), residual, max_rows, stream);
}

extern "C" int32_t gleaner_gemm_swiglu(void *out, const void *a, const float *squares, const void *weight,
                                       const void *bias, const int32_t *rows, int32_t max_rows, int32_t n, int32_t k,
                                       float eps, void *stream) {
    const SwiGlu swiglu{static_cast<bf16 *>(out), n / 2};
    return launch(operands_of(a, weight, bias, rows, {}, row_norm(squares, k, eps), n, k), swiglu, max_rows, stream);
}

extern "C" int32_t gleaner_gemm_rope(void *out, const void *a, const float *squares, const void *weight,
                                     const void *bias, const void *table, const int32_t *rows, GleanerStarts starts,
                                     int32_t max_rows, int32_t n, int32_t k, int32_t head_dim, int32_t rope_columns,
                                     float eps, void *stream) {
    const Rope rope{static_cast<bf16 *>(out), static_cast<const float2 *>(table), starts.position, n, head_dim,
                    rope_columns};
    return launch(operands_of(a, weight, bias, rows, starts, row_norm(squares, k, eps), n, k), rope, max_rows, stream);
}
