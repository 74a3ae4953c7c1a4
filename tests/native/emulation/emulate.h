// Included before every file of csrc/cuda when it is compiled as plain C++: its kernels then run on the CPU through the
// shim, for tensors of the emulated CUDA device (torch_device.cpp). What the ops do around the kernels (registration,
// checks, plans, pointers, buffers) is the very code that runs on a GPU.
#pragma once

#include "native/cuda/tensor_core_shim.h"

// After the shim.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <cuda_runtime.h>

#include "native/emulation/emulated_runtime.h"

// What launch.cuh starts.
namespace sq {
template <typename... Parameters, typename... Arguments>
void start_emulated(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes, void* /*stream*/,
                    const Arguments&... arguments) {
  if (!emulated::can_start(reinterpret_cast<const void*>(kernel), shared_bytes)) return;
  shim::run_tensor_cores(kernel, static_cast<unsigned>(blocks), static_cast<unsigned>(threads),
                         static_cast<size_t>(shared_bytes), Parameters(arguments)...);
}
}  // namespace sq

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int) {}
};
}  // namespace torch::stable::accelerator
#define DeviceGuard NoGuard

#undef STD_CUDA_KERNEL_LAUNCH_CHECK
#define STD_CUDA_KERNEL_LAUNCH_CHECK() \
  SQ_CHECK(cudaGetLastError() == cudaSuccess, "emulated device: a kernel did not start")
