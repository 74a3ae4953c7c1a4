// Layers of the same input whose tensors lie one after the other in memory are one layer: one product, not several.
#pragma once

#include <vector>

#include "cuda/compute/product.h"
#include "cuda/compute/views.h"

namespace sq {

inline bool is_behind(const Tensor& first, const Tensor& second, int64_t element_bytes) {
  const auto* end = static_cast<const uint8_t*>(first.const_data_ptr()) + first.numel() * element_bytes;
  return first.is_contiguous() && second.is_contiguous() && second.const_data_ptr() == end;
}

// Whether layer `index + 1` continues layer `index`: weight, a scale for each column, and bias.
inline bool continues(const LayerLists& layers, size_t index) {
  const LayerTensors one = layers[index], next = layers[index + 1];
  const bool has_bias = one.bias.has_value();
  if (one.scale.numel() != one.weight.size(0) || next.scale.numel() != next.weight.size(0)) return false;
  if (next.bias.has_value() != has_bias) return false;
  if (has_bias) {
    const ScalarType dtype = one.bias->scalar_type();
    if (next.bias->scalar_type() != dtype || !is_behind(*one.bias, *next.bias, element_size(kernel_dtype(dtype)))) {
      return false;
    }
  }
  return is_behind(one.weight, next.weight, 1) && is_behind(one.scale, next.scale, sizeof(float));
}

// y [..., N of all] of layers [first, first + count) where they are one, else y of each; `shapes` are those of `layers`.
// Their checks are done.
inline std::vector<Tensor> multiply_joined_cuda(const char* op, const Tensor& a, const Tensor& a_scale,
                                                const LayerLists& layers, const GemmShape* shapes, size_t first,
                                                size_t count, ScalarType out_dtype) {
  bool is_one = true;
  GemmShape whole = shapes[first];
  for (size_t i = first + 1; i < first + count; ++i) {
    is_one = is_one && continues(layers, i - 1);
    whole.n += shapes[i].n;
  }
  std::vector<Tensor> y;
  if (is_one) {
    const LayerTensors one = layers[first];
    const Tensor weight = view_of(one.weight, {whole.n, whole.k}), scale = view_of(one.scale, {whole.n});
    const OptionalTensor bias = one.bias.has_value() ? OptionalTensor(view_of(*one.bias, {whole.n})) : std::nullopt;
    const Tensor all = multiply_cuda(op, a, a_scale, {weight, scale, bias}, whole, out_dtype);
    int64_t column = 0;
    for (size_t i = first; i < first + count; column += shapes[i++].n) {
      y.push_back(columns_of(all, column, shapes[i].n));
    }
    return y;
  }
  for (size_t i = first; i < first + count; ++i) {
    y.push_back(multiply_cuda(op, a, a_scale, layers[i], shapes[i], out_dtype));
  }
  return y;
}

}  // namespace sq
