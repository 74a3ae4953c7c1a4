// Starts a kernel on a stream; the tests' shim, which runs kernels on the CPU, has a start of its own.
#pragma once

#include "cuda/kernels/shared_memory.h"

namespace sq {

// Errors are left to cudaGetLastError.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, void* stream,
            const Arguments&... arguments) {
  if (allow_shared(reinterpret_cast<const void*>(kernel), shared_bytes) != cudaSuccess) return;
#ifdef __CUDACC__
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes),
           static_cast<cudaStream_t>(stream)>>>(arguments...);
#else
  start_emulated(kernel, blocks, threads, shared_bytes, stream, arguments...);
#endif
}

}  // namespace sq
