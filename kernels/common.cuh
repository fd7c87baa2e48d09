// What the kernels share: bf16 pairs, asynchronous copies, and the tensor-core instructions of sm_80.
#pragma once

#include <cuda_bf16.h>
#include <stdint.h>

using bf16 = __nv_bfloat16;

// Overlap of a kernel with the one before it (programmatic dependent launch), where the GPU has it. A kernel that was
// launched so may start early, and must wait before it reads or writes anything that the kernel before it touches. What never
// changes, as weights, it may read before; and what kernels further back wrote, if the one before it has waited for them before
// it let this one start, or if one in between was launched without overlap.
__device__ inline void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel start, if it was launched to overlap.
__device__ inline void start_next() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// An attribute of the device that work is launched on.
inline cudaError_t device_attribute(int *value, cudaDeviceAttr attribute) {
    int device;
    const cudaError_t status = cudaGetDevice(&device);
    return status == cudaSuccess ? cudaDeviceGetAttribute(value, attribute, device) : status;
}

// Launches a kernel that may start before the one before it has ended.
template <class... Parameters, class... Arguments>
int32_t launch_overlapping(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, void *stream,
                           Arguments... arguments) {
    int major;
    cudaError_t status = device_attribute(&major, cudaDevAttrComputeCapabilityMajor);
    // Above 48 KiB it must be asked for, and what the kernel declares counts too.
    if (status == cudaSuccess && shared_bytes > 32 * 1024)
        status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (status != cudaSuccess) return status;
    cudaLaunchAttribute overlap{};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = threads;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &overlap;
    config.numAttrs = major >= 9 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// A device integer that says where rows start, or 0.
__device__ inline int start_of_rows(const int32_t *start) { return start ? *start : 0; }

// 2^x in one instruction; exp2f adds three for subnormal numbers.
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x, off by 2^-23 of it at most, and zero where it would be subnormal; x is not.
__device__ inline float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two bf16 as one register. The lower address is the lower half.
__device__ inline uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&pair);
}

__device__ inline float2 unpack(uint32_t bits) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162 *>(&bits));
}

__device__ inline uint32_t shared_address(const void *pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Copies 16 bytes from global to shared memory, or fills them with zeros without reading `from`.
__device__ inline void copy_async(uint32_t to, const void *from, bool valid) {
    const int bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes));
}

__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;"); }

template <int kPending>
__device__ inline void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending));
}

// Four 8x8 matrices of bf16. Lane i gives the address of row i % 8 of matrix i / 8.
__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address));
}

__device__ inline void load_matrices_transposed(uint32_t (&to)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address));
}

// c[16, 8] += a[16, 16] b[16, 8]. A lane holds of c the columns 2 * (lane % 4) + {0, 1} of the rows lane / 4 (c[0], c[1])
// and lane / 4 + 8 (c[2], c[3]).
__device__ inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
