// Tokens in the order of their likelihood, as integers: greater is likelier, and of equals the one of smaller id.
#pragma once

#include <stdint.h>

using Wide = unsigned long long;

constexpr int kIdBits = 24;

// A logit that is not a number comes first, infinity next.
__device__ inline Wide ordered(float logit, uint32_t id) {
    const uint32_t bits = __float_as_uint(logit + 0.f);  // -0 is 0
    const uint32_t key = logit != logit ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return static_cast<Wide>(key) << kIdBits | ((1u << kIdBits) - 1 - id);
}

__device__ inline uint32_t id_of(Wide token) { return (1u << kIdBits) - 1 - (token & ((1u << kIdBits) - 1)); }
