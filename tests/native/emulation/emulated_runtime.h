// What the emulated device knows besides cuda_runtime.h.
#pragma once

#include <cstdint>

namespace emulated {

// Whether a block of the kernel gets so much dynamic shared memory; if not, cudaGetLastError says it.
bool can_start(const void* kernel, int64_t shared_bytes);

// That this thread has called the runtime, as whoever calls the driver must have.
bool has_context();

}  // namespace emulated
