// From torch's tensors to the kernels' arguments.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "common/checks.h"
#include "common/dtypes.h"

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

inline std::vector<int64_t> shape_of(const Tensor& x) {
  const auto sizes = x.sizes();
  return {sizes.begin(), sizes.end()};
}

// The shape of x [..., K] with `last` in place of K.
inline std::vector<int64_t> replace_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape = shape_of(x);
  shape.back() = last;
  return shape;
}

// The shape of x [..., K] without K.
inline std::vector<int64_t> drop_last(const Tensor& x) {
  std::vector<int64_t> shape = shape_of(x);
  shape.pop_back();
  return shape;
}

// A new contiguous CPU tensor. This goes past the dispatcher, which would take longer than a small product.
inline Tensor empty_cpu(const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(1, shape[i]);
  }
  const auto dtype_code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                         strides.data(), dtype_code, aoti_torch_device_type_cpu(), 0,
                                                         &handle));
  return Tensor(handle);
}

// Asks Linux to back a large tensor that nothing was written to yet with 2 MB pages: a weight is read in one stream, and
// every 4 KB page would cost a look-up. Its pages belong to the memory node of the thread that first writes them.
inline void advise_huge_pages(const Tensor& tensor) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge;
  const uintptr_t last = (begin + static_cast<uintptr_t>(tensor.numel())) / kHuge * kHuge;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // a wish: it may fail
#else
  static_cast<void>(tensor);
#endif
}

// The value of an activation's static scale, which on the CPU can be looked at; 0 where there is none.
inline float checked_static_scale(const char* op, const ArgName& name, const OptionalTensor& scale,
                                  const ArgName& a_name, const Tensor& a) {
  if (!scale.has_value()) return 0.0f;
  check_same_device(op, name, *scale, a_name, a);
  check_static_scale(op, name, *scale);
  const float value = *pointer<float>(*scale);
  SQ_CHECK(value > 0.0f && std::isfinite(value), op, ": ", name, " is ", value, ", expected a positive finite number");
  return value;
}

// The same for any device: elsewhere than on the CPU, its value is not looked at, because that would wait for it.
inline void check_static_scale(const char* op, const ArgName& name, const OptionalTensor& scale, const ArgName& a_name,
                               const Tensor& a) {
  if (!scale.has_value()) return;
  check_same_device(op, name, *scale, a_name, a);
  check_static_scale(op, name, *scale);
  if (scale->is_cpu()) checked_static_scale(op, name, scale, a_name, a);
}

}  // namespace sq
