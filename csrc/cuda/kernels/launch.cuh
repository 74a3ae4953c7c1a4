// Starts a kernel on a stream; the tests' shim, which runs kernels on the CPU, has a launch of its own.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace sq {

#ifdef __CUDACC__
// Errors are left to cudaGetLastError.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, void* stream,
            const Arguments&... arguments) {
  constexpr int64_t kFree = 48 * 1024;  // more shared memory has to be asked for
  if (shared_bytes > kFree) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  }
  kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), static_cast<size_t>(shared_bytes),
           static_cast<cudaStream_t>(stream)>>>(arguments...);
}
#endif

}  // namespace sq
