#include "kernels.h"

extern "C" const char *gleaner_error_string(int32_t status) {
    return cudaGetErrorString(static_cast<cudaError_t>(status));
}
