// What every CUDA binding needs around a launch.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include "common/checks.h"
#include "common/tensors.h"

namespace sq {

using torch::stable::accelerator::DeviceGuard;

constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;  // of a grid's first dimension

inline void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

// A new contiguous tensor on the device of `like`, from torch's allocator, so that CUDA graphs can capture it.
inline Tensor empty_like_device(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

inline void check_rows(const char* op, int64_t rows) {
  SQ_CHECK(rows <= kMaxBlocks, op, ": there are ", rows, " rows, expected at most ", kMaxBlocks);
}

// A static scale stays on the device: looking at its value would wait for it.
inline const float* static_scale_pointer(const char* op, const ArgName& name, const OptionalTensor& scale,
                                         const ArgName& a_name, const Tensor& a) {
  if (!scale.has_value()) return nullptr;
  check_same_device(op, name, *scale, a_name, a);
  check_static_scale(op, name, *scale);
  return pointer<float>(*scale);
}

}  // namespace sq
