// The residual stream, of which kernels hand on x times the weights of the norm that comes next, as fp32 in two halves:
// `scaled`, the nearest bf16, of which the next product is made, and `rest`, the bits that it lacks. Of the bits of the fp32
// plus 0x8000, scaled is the upper half and rest the lower one: ties go away from zero. Nothing is lost between kernels but by
// product and quotient. Of numbers that are not finite scaled may be one that is; the sums of squares tell.
#pragma once

#include "common.cuh"

// The weights of a norm for two columns, as the stream is multiplied with them: not nearer to zero than 2^-60, or x could not
// be had back. What such a column adds to a product is nothing to its sum.
__device__ inline uint32_t stream_weights(uint32_t norm) {
    constexpr uint32_t kLeast = 0x21802180;  // 2^-60, twice
    return __vmaxu2(norm & 0x7fff7fff, kLeast) | (norm & 0x80008000);
}

// x and y as words of both halves.
__device__ inline void split_pair(float x, float y, uint32_t &scaled, uint32_t &rest) {
    const uint32_t low = __float_as_uint(x) + 0x8000, high = __float_as_uint(y) + 0x8000;
    scaled = __byte_perm(low, high, 0x7632), rest = __byte_perm(low, high, 0x5410);
}

__device__ inline float2 join_pair(uint32_t scaled, uint32_t rest) {
    return {__uint_as_float(__byte_perm(rest, scaled, 0x5410) - 0x8000),
            __uint_as_float(__byte_perm(rest, scaled, 0x7632) - 0x8000)};
}
