// Ranges for NVIDIA's profilers, over NVIDIA's own header. Without a profiler, which says so in the environment, the header
// opens no library and there is no domain.
#include <nvtx3/nvToolsExt.h>

#include "kernels.h"

void *gleaner_range_domain(void) {
    return nvtxDomainCreateA("gleaner");
}

void gleaner_range_push(void *domain, const char *name) {
    const nvtxEventAttributes_t range = {
        .version = NVTX_VERSION,
        .size = NVTX_EVENT_ATTRIB_STRUCT_SIZE,
        .messageType = NVTX_MESSAGE_TYPE_ASCII,
        .message.ascii = name,
    };
    nvtxDomainRangePushEx((nvtxDomainHandle_t)domain, &range);
}

void gleaner_range_pop(void *domain) {
    nvtxDomainRangePop((nvtxDomainHandle_t)domain);
}
