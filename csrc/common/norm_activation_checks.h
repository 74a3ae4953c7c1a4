// Arguments of norms and activations, for every device.
#pragma once

#include <string>
#include <tuple>
#include <vector>

#include "common/activation.h"
#include "common/checks.h"
#include "common/norm.h"
#include "common/tensors.h"

namespace sq {

using Quantized = std::tuple<Tensor, Tensor>;             // q and scale
using QuantizedSum = std::tuple<Tensor, Tensor, Tensor>;  // and x + residual

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

// A norm's weight or bias of `count` elements, on the device of x.
inline void check_channels(const char* op, const char* name, const Tensor& values, const Tensor& x,
                           const char* dimension, int64_t count) {
  check_same_device(op, name, values, "x", x);
  check_float(op, name, values.scalar_type());
  SQ_CHECK(values.numel() == count, op, ": ", name, " has ", values.numel(), " elements, expected ", dimension, "=",
           count);
}

// One of x [..., K].
inline void check_channels(const char* op, const char* name, const Tensor& values, const Tensor& x) {
  check_channels(op, name, values, x, "K", x.size(x.dim() - 1));
}

inline void check_norm(const char* op, const Tensor& x, const Tensor& weight) {
  check_activation(op, x);
  check_channels(op, "weight", weight, x);
}

// What an op takes that quantizes a norm of x, or of x + residual. No scale: one a row.
struct NormQuantizeInputs {
  Norm norm;
  const Tensor& x;
  const Tensor& weight;
  const OptionalTensor& bias;
  double eps, offset;
  ScalarType dtype;
  const OptionalTensor &residual, &scale;
};

// All but the static scale: each device reads it in its own way. So below.
inline void check_norm_quantize(const char* op, const NormQuantizeInputs& inputs) {
  check_activation(op, inputs.x);
  check_8bit(op, "dtype", inputs.dtype);
  check_channels(op, "weight", inputs.weight, inputs.x);
  if (inputs.bias.has_value()) check_channels(op, "bias", *inputs.bias, inputs.x);
  if (inputs.residual.has_value()) check_alike(op, "residual", *inputs.residual, "x", inputs.x);
}

// The shape of the third result, x + residual.
inline std::vector<int64_t> sum_shape(const Tensor& x, const OptionalTensor& residual) {
  return residual.has_value() ? shape_of(x) : std::vector<int64_t>{0};
}

// What an op takes that quantizes act(gate), or act(gate) * up.
struct ActivateQuantizeInputs {
  Activation activation;
  const Tensor& gate;
  const OptionalTensor& up;
  ScalarType dtype;
  const OptionalTensor& scale;
  int64_t rotate;
};

// Returns what messages call the first argument.
inline const char* check_activate_quantize(const char* op, const ActivateQuantizeInputs& inputs) {
  const char* name = inputs.up.has_value() ? "gate" : "x";
  check_activation(op, inputs.gate, name);
  check_8bit(op, "dtype", inputs.dtype);
  if (inputs.up.has_value()) check_alike(op, "up", *inputs.up, name, inputs.gate);
  check_rotate(op, inputs.rotate, inputs.gate.size(inputs.gate.dim() - 1));
  return name;
}

}  // namespace sq
