// The declarations of the ops that quantize norms and activations, the same on every device:
// Device::norm_quantize(op, NormQuantizeInputs) and Device::activate_quantize(op, ActivateQuantizeInputs) check and compute.
#pragma once

#include <torch/csrc/stable/library.h>

#include "common/norm_activation_checks.h"
#include "common/op_string.h"

namespace sq {

template <class Device>
struct NormActivationOps {
  static QuantizedSum rms_norm_quantize(const Tensor& x, const Tensor& weight, double eps, ScalarType dtype,
                                        const OptionalTensor& residual, const OptionalTensor& scale, double offset) {
    const OptionalTensor bias;
    return Device::norm_quantize("rms_norm_quantize",
                                 {Norm::kRms, x, weight, bias, eps, offset, dtype, residual, scale});
  }

  // An offset of -0 changes nothing: x + -0 is x, also for x = -0.
  static QuantizedSum layer_norm_quantize(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, double eps,
                                          ScalarType dtype, const OptionalTensor& residual,
                                          const OptionalTensor& scale) {
    return Device::norm_quantize("layer_norm_quantize",
                                 {Norm::kLayer, x, weight, bias, eps, -0.0, dtype, residual, scale});
  }

  static Quantized silu_mul_quantize(const Tensor& gate, const Tensor& up, ScalarType dtype,
                                     const OptionalTensor& scale, int64_t rotate) {
    return gated("silu_mul_quantize", Activation::kSilu, gate, up, dtype, scale, rotate);
  }

  static Quantized gelu_mul_quantize(const Tensor& gate, const Tensor& up, ScalarType dtype,
                                     const OptionalTensor& scale, const OpString& approximate, int64_t rotate) {
    constexpr const char* kOp = "gelu_mul_quantize";
    return gated(kOp, gelu_kind(kOp, approximate), gate, up, dtype, scale, rotate);
  }

  static Quantized gelu_quantize(const Tensor& x, ScalarType dtype, const OptionalTensor& scale,
                                 const OpString& approximate, int64_t rotate) {
    constexpr const char* kOp = "gelu_quantize";
    return plain(kOp, gelu_kind(kOp, approximate), x, dtype, scale, rotate);
  }

  static Quantized relu_quantize(const Tensor& x, ScalarType dtype, const OptionalTensor& scale, int64_t rotate) {
    return plain("relu_quantize", Activation::kRelu, x, dtype, scale, rotate);
  }

  // Registers them all on the device.
  template <class Library>
  static void implement(Library& m) {
    m.impl("rms_norm_quantize", TORCH_BOX(&NormActivationOps::rms_norm_quantize));
    m.impl("layer_norm_quantize", TORCH_BOX(&NormActivationOps::layer_norm_quantize));
    m.impl("silu_mul_quantize", TORCH_BOX(&NormActivationOps::silu_mul_quantize));
    m.impl("gelu_mul_quantize", TORCH_BOX(&NormActivationOps::gelu_mul_quantize));
    m.impl("gelu_quantize", TORCH_BOX(&NormActivationOps::gelu_quantize));
    m.impl("relu_quantize", TORCH_BOX(&NormActivationOps::relu_quantize));
  }

 private:
  static Quantized gated(const char* op, Activation activation, const Tensor& gate, const OptionalTensor& up,
                         ScalarType dtype, const OptionalTensor& scale, int64_t rotate) {
    return Device::activate_quantize(op, {activation, gate, up, dtype, scale, rotate});
  }

  static Quantized plain(const char* op, Activation activation, const Tensor& x, ScalarType dtype,
                         const OptionalTensor& scale, int64_t rotate) {
    return gated(op, activation, x, std::nullopt, dtype, scale, rotate);
  }
};

}  // namespace sq
