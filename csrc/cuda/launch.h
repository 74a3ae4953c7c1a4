// What every CUDA binding needs around a launch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <cstdlib>
#include <cstring>

#include "checks.h"

namespace sq {

using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;  // of a grid's first dimension

inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

// For kernels that no GPU has run yet: nobody gets their numbers without having asked for them.
inline void require_unvalidated_is_wanted(const char* op) {
  const char* wanted = std::getenv("SMOOTHQUANT_UNVALIDATED_CUDA");
  SQ_CHECK(wanted != nullptr && std::strcmp(wanted, "1") == 0, op,
           ": its CUDA kernel has never run on a GPU; move the tensors to the CPU, or set "
           "SMOOTHQUANT_UNVALIDATED_CUDA=1 to try it");
}

}  // namespace sq
