// From the tags of types to types and constants.
#pragma once

#include <type_traits>

#include "common/dtypes.h"

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

template <DType kDType>
using DTypeConstant = std::integral_constant<DType, kDType>;

// body(DTypeConstant<dtype>{}) for int8 or either fp8.
template <typename Body>
void with_8bit_type(DType dtype, const Body& body) {
  if (dtype == DType::kInt8) return body(DTypeConstant<DType::kInt8>{});
  if (dtype == DType::kFloat8E4M3) return body(DTypeConstant<DType::kFloat8E4M3>{});
  body(DTypeConstant<DType::kFloat8E5M2>{});
}

// body(DTypeConstant<a>{}, DTypeConstant<b>{}) for operands that can be multiplied: both int8, or either fp8.
template <typename Body>
void with_operand_types(DType a, DType b, const Body& body) {
  constexpr DTypeConstant<DType::kFloat8E4M3> kE4M3;
  constexpr DTypeConstant<DType::kFloat8E5M2> kE5M2;
  if (a == DType::kInt8) return body(DTypeConstant<DType::kInt8>{}, DTypeConstant<DType::kInt8>{});
  const bool is_e4m3 = b == DType::kFloat8E4M3;
  if (a == DType::kFloat8E4M3) return is_e4m3 ? body(kE4M3, kE4M3) : body(kE4M3, kE5M2);
  is_e4m3 ? body(kE5M2, kE4M3) : body(kE5M2, kE5M2);
}

}  // namespace sq
