// Arguments of the ops that run over rows, for every device.
#pragma once

#include <string>

#include "../checks.h"
#include "kernels/rows.h"

namespace sq {

inline Activation activation_kind(const char* op, const std::string& name) {
  constexpr std::pair<const char*, Activation> kNames[] = {{"silu", Activation::kSilu},
                                                           {"gelu", Activation::kGelu},
                                                           {"gelu_tanh", Activation::kGeluTanh},
                                                           {"relu", Activation::kRelu}};
  for (const auto& [known, kind] : kNames) {
    if (name == known) return kind;
  }
  fail(op, ": activation is '", name, "', expected silu, gelu, gelu_tanh or relu");
}

inline Activation gelu_kind(const char* op, const std::string& approximate) {
  SQ_CHECK(approximate == "none" || approximate == "tanh", op, ": approximate is '", approximate,
           "', expected none or tanh");
  return approximate == "none" ? Activation::kGelu : Activation::kGeluTanh;
}

// A weight or bias of x [..., K].
inline void check_channels(const char* op, const char* name, const Tensor& values, const Tensor& x) {
  const int64_t k = x.size(x.dim() - 1);
  check_same_device(op, name, values, "x", x);
  check_float(op, name, values.scalar_type());
  SQ_CHECK(values.numel() == k, op, ": ", name, " has ", values.numel(), " elements, expected K=", k);
}

}  // namespace sq
