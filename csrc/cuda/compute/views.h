// Tensors on the memory of other tensors, made without the dispatcher.
#pragma once

#include <vector>

#include "common/tensors.h"

namespace sq {

inline std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(1, shape[i]);
  }
  return strides;
}

// Elements of `base` from its `offset`-th on; nobody checks that they lie within it.
inline Tensor view_of(const Tensor& base, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides,
                      int64_t offset = 0) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(base.get(), static_cast<int64_t>(shape.size()),
                                                               shape.data(), strides.data(), offset, &handle));
  return Tensor(handle);
}

// A contiguous one.
inline Tensor view_of(const Tensor& base, const std::vector<int64_t>& shape) {
  return view_of(base, shape, contiguous_strides(shape));
}

// Columns [first, first + count) of a contiguous [..., n].
inline Tensor columns_of(const Tensor& base, int64_t first, int64_t count) {
  std::vector<int64_t> strides = contiguous_strides(shape_of(base));
  return view_of(base, replace_last(base, count), strides, first);
}

}  // namespace sq
