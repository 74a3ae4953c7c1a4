// From the tag of a floating-point type to the type.
#pragma once

#include "cpu/kernels/dtypes.h"

namespace sq {

template <typename T>
struct Type {
  using type = T;
};

// body(Type<T>{}) for float, BFloat16 or Float16.
template <typename Body>
void with_float_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kBFloat16:
      return body(Type<BFloat16>{});
    case DType::kFloat16:
      return body(Type<Float16>{});
    default:
      return body(Type<float>{});
  }
}

}  // namespace sq
