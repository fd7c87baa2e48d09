// The contract between the kernels and the rest: every launcher, and nothing else. build.rs makes the Rust
// declarations from this file, so it includes no CUDA header.
//
// A launcher takes outputs, inputs, dimensions and the stream, in this order. It returns a cudaError_t (0 is success),
// allocates nothing, waits for nothing and keeps no state. Pointers are device memory, aligned to 16 bytes.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// The text of a cudaError_t.
const char *gleaner_error_string(int32_t status);

// out[r, :] = x[r, :] / sqrt(mean(x[r, :]^2) + eps) * weight
// out, x: bf16 [rows, hidden_size]; weight: bf16 [hidden_size]; hidden_size a multiple of 8.
int32_t gleaner_rms_norm(void *out, const void *x, const void *weight, int32_t rows, int32_t hidden_size, float eps,
                         void *stream);

#ifdef __cplusplus
}
#endif
