// Arguments of linear, which multiplies bf16 matrices, for every device.
#pragma once

#include "common/checks.h"

namespace sq {

struct LinearShape {
  int64_t m, n, k;
};

inline void check_bf16(const char* op, const char* name, const Tensor& tensor) {
  SQ_CHECK(tensor.scalar_type() == ScalarType::BFloat16, op, ": ", name, " is ", dtype_text(tensor.scalar_type()),
           ", expected bfloat16");
}

inline LinearShape check_bf16_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  constexpr const char* kOp = "linear";
  check_bf16(kOp, "x", x);
  check_bf16(kOp, "weight", weight);
  SQ_CHECK(x.dim() >= 1, kOp, ": x has no dimensions, expected [..., K]");
  SQ_CHECK(weight.dim() == 2, kOp, ": weight has shape ", shape_text(weight), ", expected [N, K]");
  check_same_device(kOp, "weight", weight, "x", x);
  const LinearShape shape{row_count(x), weight.size(0), x.size(x.dim() - 1)};
  SQ_CHECK(weight.size(1) == shape.k, kOp, ": x has K=", shape.k, ", but weight has K=", weight.size(1));
  if (bias.has_value()) {
    check_bf16(kOp, "bias", *bias);
    check_same_device(kOp, "bias", *bias, "x", x);
    SQ_CHECK(bias->numel() == shape.n, kOp, ": bias has ", bias->numel(), " elements, expected N=", shape.n);
  }
  return shape;
}

}  // namespace sq
