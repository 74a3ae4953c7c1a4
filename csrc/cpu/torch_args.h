// From torch's tensors to the kernels' arguments.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <vector>

#include "../checks.h"
#include "kernels/gemm.h"

namespace sq {

inline DType kernel_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Char:
      return DType::kInt8;
    case ScalarType::Float8_e4m3fn:
      return DType::kFloat8E4M3;
    case ScalarType::Float8_e5m2:
      return DType::kFloat8E5M2;
    default:
      return DType::kFloat32;
  }
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> as_contiguous(const OptionalTensor& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(as_contiguous(*tensor)) : std::nullopt;
}

template <class T>
const T* pointer(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* pointer(const OptionalTensor& tensor) {
  return tensor.has_value() ? pointer<T>(*tensor) : nullptr;
}

// The shape of x without its last dimension, and with `last` instead when that is not negative.
inline std::vector<int64_t> replace_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  if (last >= 0) shape.push_back(last);
  return shape;
}

// The value of a static scale, which on the CPU can be looked at.
inline float static_scale_value(const char* op, const char* name, const Tensor& scale) {
  const float value = *pointer<float>(scale);
  SQ_CHECK(value > 0.0f && std::isfinite(value), op, ": ", name, " is ", value, ", expected a positive finite number");
  return value;
}

}  // namespace sq
