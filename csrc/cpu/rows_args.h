// Arguments of the ops that run over rows: names of activations.
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

}  // namespace sq
