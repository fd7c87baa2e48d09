// Hopper's own machinery (sm_90a): barriers in shared memory, tiles copied by the tensor memory accelerator, and products
// of a warpgroup. For files whose name ends in _sm90: the build compiles those for sm_90a alone.
#pragma once

#include <cuda.h>

#include "common.cuh"

__host__ __device__ inline int divide_up(int a, int b) { return (a + b - 1) / b; }

// a / b for 0 <= a < 2^20 and b > 0, in few instructions: the half that is added is more than what is lost in rounding.
__device__ inline int divide_fast(int a, int b) {
    return static_cast<int>(__fdividef(static_cast<float>(a) + 0.5f, static_cast<float>(b)));
}

// A matrix [rows, columns] of bf16 or fp32, row-major, that is copied in boxes of 128 bytes of each row: 64 columns of bf16. A
// box lies in shared memory as rows of 128 bytes whose 16-byte pieces are swizzled: piece p of row r lies at p ^ (r % 8), so
// the box must start at a multiple of 1024. What a box has beyond the matrix is filled with zeros.
constexpr int kBoxColumns = 64;

// The driver's function that describes a matrix to the copy engine, looked up once.
inline int32_t find_encoder(decltype(&cuTensorMapEncodeTiled) *encode) {
    struct Found {
        void *function = nullptr;
        int32_t status;
        Found() {
            cudaDriverEntryPointQueryResult result;
            status = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
            if (status == cudaSuccess && result != cudaDriverEntryPointSuccess) status = cudaErrorSymbolNotFound;
        }
    };
    static const Found found;
    *encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found.function);
    return found.status;
}

template <class T>
int32_t make_tensor_map(CUtensorMap *map, const T *matrix, uint64_t rows, uint64_t columns, uint32_t box_rows) {
    constexpr bool kFloat = sizeof(T) == sizeof(float);
    decltype(&cuTensorMapEncodeTiled) encode;
    if (const int32_t status = find_encoder(&encode)) return status;
    const cuuint64_t sizes[2] = {columns, rows}, strides[1] = {columns * sizeof(T)};
    const cuuint32_t box[2] = {128 / sizeof(T), box_rows}, steps[2] = {1, 1};
    const CUresult result =
        encode(map, kFloat ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<T *>(matrix),
               sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

__device__ inline void barrier_init(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}

// Makes the initialised barriers visible to the copy engine.
__device__ inline void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and holds the phase open until so many bytes have been copied.
__device__ inline void barrier_expect(uint32_t barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Waits until the phase of this parity is over.
__device__ inline void barrier_wait(uint32_t barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "again:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n}"
        ::"r"(barrier), "r"(parity)
        : "memory");
}

__device__ inline void barrier_arrive_here(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives at the barrier that lies where `barrier` does in the CTA of this rank in the cluster. That what this thread
// wrote be visible there is not promised, and would cost a wait.
__device__ inline void barrier_arrive(uint32_t barrier, uint32_t rank) {
    asm volatile(
        "{\n.reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}"
        ::"r"(barrier), "r"(rank)
        : "memory");
}

// Turns of two warpgroups: one waits at a named barrier of the CTA until the other has arrived there.
__device__ inline void wait_for_turn(int barrier) { asm volatile("bar.sync %0, 256;" ::"r"(barrier) : "memory"); }
__device__ inline void give_turn(int barrier) { asm volatile("bar.arrive %0, 256;" ::"r"(barrier) : "memory"); }

// A stage of a ring, and the parity of the phase its barriers are in.
template <int kCount>
struct Ring {
    int stage = 0;
    uint32_t parity = 0;
    __device__ void next() {
        if (++stage == kCount) stage = 0, parity ^= 1;
    }
    __device__ void skip(int count) {
        stage += count;
        parity ^= stage / kCount & 1;
        stage %= kCount;
    }
};

__device__ inline uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// A barrier of all threads of the cluster, in two halves. Of what they wrote, it promises what a fence before it does, and no
// more: a promise about all memory would cost a wait.
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }

// This thread's warp, taken from one lane, for the compiler to see that a warp branches as one.
__device__ inline int warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }

// True for one thread of a warp, all of which ask. A compiler that sees copies behind this condition knows that one thread asks
// for them; behind another it makes each of them a loop over threads.
__device__ inline bool elect() {
    uint32_t elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
    return elected;
}

// Copies the box whose first element is (row, column).
__device__ inline void copy_box(uint32_t to, const CUtensorMap *map, int row, int column, uint32_t barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

// The same to this place in all CTAs of the cluster that `ranks` has a bit for, and to the barrier of each.
__device__ inline void copy_box_to(uint32_t to, const CUtensorMap *map, int row, int column, uint32_t barrier,
                                   uint16_t ranks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, "
        "%3}], [%4], %5;" ::"r"(to),
        "l"(map), "r"(column), "r"(row), "r"(barrier), "h"(ranks)
        : "memory");
}

// What this thread wrote to shared memory is there for the tensor cores and the copy engine, once a barrier is passed.
__device__ inline void fence_for_engines() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void prefetch_map(const CUtensorMap *map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

template <int kRegisters>
__device__ inline void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Four lanes that hold word `lane % 4` of four groups of 16 bytes each get a whole group: that of their own number.
__device__ inline uint4 transpose(const uint32_t (&words)[4]) {
    const int lane = threadIdx.x % 4;
    const bool odd = lane & 1, upper = lane & 2;
    // First between neighbours, then between pairs.
    const uint32_t a = __shfl_xor_sync(0xffffffffu, odd ? words[0] : words[1], 1);
    const uint32_t b = __shfl_xor_sync(0xffffffffu, odd ? words[2] : words[3], 1);
    const uint32_t w0 = odd ? a : words[0], w1 = odd ? words[1] : a;
    const uint32_t w2 = odd ? b : words[2], w3 = odd ? words[3] : b;
    const uint32_t c = __shfl_xor_sync(0xffffffffu, upper ? w0 : w2, 2);
    const uint32_t d = __shfl_xor_sync(0xffffffffu, upper ? w1 : w3, 2);
    return upper ? uint4{c, d, w2, w3} : uint4{w0, w1, c, d};
}

// What the tensor cores want to know of a swizzled box: its address and the distance of its groups of eight rows. Adding
// kDescriptorStep moves on by 16 columns.
__device__ inline uint64_t box_descriptor(uint32_t address) {
    constexpr uint64_t kSwizzle128 = 1ull << 62, kGroupBytes = 1024;
    return kSwizzle128 | kGroupBytes / 16 << 32 | 1ull << 16 | (address & 0x3ffff) / 16;
}
constexpr uint64_t kDescriptorStep = 16 * sizeof(bf16) / 16;

// The same for a right operand whose rows are what the product sums over: boxes of 64 columns stand `box_bytes` apart.
// Adding kRowDescriptorStep moves on by 16 rows.
__device__ inline uint64_t row_box_descriptor(uint32_t address, uint64_t box_bytes) {
    constexpr uint64_t kSwizzle128 = 1ull << 62, kGroupBytes = 1024;
    return kSwizzle128 | kGroupBytes / 16 << 32 | box_bytes / 16 << 16 | (address & 0x3ffff) / 16;
}
constexpr uint64_t kRowDescriptorStep = 16 * kBoxColumns * sizeof(bf16) / 16;

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ inline void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Sums that the tensor cores have written may be read from here on, not before: a compiler does not see that the wait
// before it is what makes them.
template <int kCount>
__device__ inline void wgmma_results(float (&d)[kCount]) {
#pragma unroll
    for (float &value : d) asm volatile("" : "+f"(value)::"memory");
}

// Instructions of all widths name each of their sums: their numbers as operands, and the operands, each list from the one before.
// clang-format off
#define GLEANER_NUMBERS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define GLEANER_NUMBERS_56 GLEANER_NUMBERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55"
#define GLEANER_NUMBERS_64 GLEANER_NUMBERS_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define GLEANER_NUMBERS_80 GLEANER_NUMBERS_64 ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define GLEANER_NUMBERS_96 GLEANER_NUMBERS_80 ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define GLEANER_NUMBERS_128 GLEANER_NUMBERS_96 ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define GLEANER_SUMS_32 \
    "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), \
    "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), \
    "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
    "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define GLEANER_SUMS_56 GLEANER_SUMS_32, \
    "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), \
    "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
    "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define GLEANER_SUMS_64 GLEANER_SUMS_56, \
    "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define GLEANER_SUMS_80 GLEANER_SUMS_64, \
    "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71]), \
    "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define GLEANER_SUMS_96 GLEANER_SUMS_80, \
    "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87]), \
    "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define GLEANER_SUMS_128 GLEANER_SUMS_96, \
    "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99]), "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103]), \
    "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107]), "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111]), \
    "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115]), "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119]), \
    "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123]), "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])
// clang-format on

// d[64, n] = a[64, 16] b[n, 16]^T, added to what d holds if accumulate is not 0. Of each group of eight columns j a lane
// of warp w holds the columns 2 * (lane % 4) + {0, 1} of the rows 16 w + lane / 4 (d[4 j], d[4 j + 1]) and, of the row
// eight further down, d[4 j + 2] and d[4 j + 3].
template <int n>
__device__ void wgmma(float (&d)[n / 2], uint64_t a, uint64_t b, int accumulate);

// The operands of these numbers follow `count` sums.
#define GLEANER_WGMMA(n, count, a_number, b_number, accumulate_number)                                                      \
    template <>                                                                                                             \
    __device__ inline void wgmma<n>(float (&d)[count], uint64_t a, uint64_t b, int accumulate) {                            \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate_number ", 0;\n"                                       \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" GLEANER_NUMBERS_##count "}, %" #a_number  \
                     ", %" #b_number ", p, 1, 1, 0, 0;\n}"                                                                  \
                     : GLEANER_SUMS_##count                                                                                 \
                     : "l"(a), "l"(b), "r"(accumulate));                                                                    \
    }
GLEANER_WGMMA(112, 56, 56, 57, 58)
GLEANER_WGMMA(128, 64, 64, 65, 66)
GLEANER_WGMMA(160, 80, 80, 81, 82)
GLEANER_WGMMA(192, 96, 96, 97, 98)
GLEANER_WGMMA(256, 128, 128, 129, 130)

// The same with a in registers, its words as `mma` has them for each warp's 16 rows, and b as it lies in memory: [16, n].
template <int n>
__device__ void wgmma_registers(float (&d)[n / 2], const uint32_t *a, uint64_t b, int accumulate);

#define GLEANER_WGMMA_REGISTERS(n, count, a0, a1, a2, a3, b_number, accumulate_number)                                      \
    template <>                                                                                                             \
    __device__ inline void wgmma_registers<n>(float (&d)[count], const uint32_t *a, uint64_t b, int accumulate) {           \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #accumulate_number ", 0;\n"                                       \
                     "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16 {" GLEANER_NUMBERS_##count "}, {%" #a0       \
                     ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b_number ", p, 1, 1, 1;\n}"                                      \
                     : GLEANER_SUMS_##count                                                                                 \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));                                \
    }
GLEANER_WGMMA_REGISTERS(64, 32, 32, 33, 34, 35, 36, 37)
GLEANER_WGMMA_REGISTERS(128, 64, 64, 65, 66, 67, 68, 69)
