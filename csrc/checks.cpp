// The checks of the ops' arguments as ops of their own, on every device: what implements an op in Python calls them first.
#include <torch/csrc/stable/library.h>

#include "common/attention_checks.h"
#include "common/decoder_layer_checks.h"
#include "common/experts_checks.h"
#include "common/gemm_checks.h"
#include "common/linear_checks.h"
#include "common/norm_activation_checks.h"
#include "common/op_string.h"
#include "common/tensors.h"

namespace sq {
namespace {

void check_quantize(const OpString& op, const Tensor& x, ScalarType dtype, const OptionalTensor& smooth,
                    const OptionalTensor& scale, int64_t rotate) {
  const char* name = op.value.c_str();
  check_activation(name, x);
  check_8bit(name, "dtype", dtype);
  check_rotate(name, rotate, x.size(x.dim() - 1));
  check_smooth(name, smooth, x);
  check_static_scale(name, "scale", scale, "x", x);
}

void check_norm_quantize_op(const OpString& op, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                            ScalarType dtype, const OptionalTensor& residual, const OptionalTensor& scale) {
  check_norm_quantize(op.value.c_str(), {Norm::kRms, x, weight, bias, 0.0, 0.0, dtype, residual, scale});
  check_static_scale(op.value.c_str(), "scale", scale, "x", x);
}

void check_activate_quantize_op(const OpString& op, const Tensor& gate, const OptionalTensor& up, ScalarType dtype,
                                const OptionalTensor& scale, const OpString& approximate, int64_t rotate) {
  const Activation any = gelu_kind(op.value.c_str(), approximate);
  const char* name = check_activate_quantize(op.value.c_str(), {any, gate, up, dtype, scale, rotate});
  check_static_scale(op.value.c_str(), "scale", scale, name, gate);
}

void check_gemm(const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                const OptionalTensor& bias, ScalarType out_dtype) {
  check_w8a8_gemm(a, a_scale, {b, b_scale, bias}, out_dtype);
}

void check_w8a8_linear(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const OptionalTensor& bias,
                       const OptionalTensor& input_scale, const OptionalTensor& smooth,
                       std::optional<ScalarType> out_dtype, int64_t rotate) {
  constexpr const char* kOp = "w8a8_linear";
  check_linear(kOp, x, {weight, weight_scale, bias}, out_dtype, rotate);
  check_smooth(kOp, smooth, x);
  check_static_scale(kOp, "input_scale", input_scale, "x", x);
}

void check_linear_group_op(const Tensor& x, const std::vector<Tensor>& weight, const std::vector<Tensor>& weight_scale,
                           const OptionalTensors& bias, const OptionalTensor& input_scale,
                           std::optional<ScalarType> out_dtype, int64_t rotate) {
  constexpr const char* kOp = "w8a8_linear_group";
  check_linear_group(kOp, x, {weight, weight_scale, bias}, out_dtype, rotate);
  check_static_scale(kOp, "input_scale", input_scale, "x", x);
}

void check_mlp_op(const Tensor& x, const std::vector<Tensor>& weight, const std::vector<Tensor>& weight_scale,
                  const OptionalTensors& bias, const OptionalTensors& input_scale, const OpString& activation,
                  const Rotations& rotate) {
  constexpr const char* kOp = "w8a8_mlp";
  const LayerLists layers{weight, weight_scale, bias};
  check_mlp(kOp, x, layers, input_scale, rotate);
  activation_kind(kOp, activation);
  for (size_t i = 0; i < 2; ++i) {
    check_static_scale(kOp, mlp_input_scale_name(layers, i), element_of(input_scale, i), "x", x);
  }
}

// All but the values of top_k_index.
void check_experts_op(const Tensor& x, const Tensor& index, const Tensor& weights, const std::vector<Tensor>& weight,
                      const std::vector<Tensor>& weight_scale, const OptionalTensors& bias, const OpString& activation,
                      const Rotations& rotate) {
  constexpr const char* kOp = "w8a8_experts";
  check_experts(kOp, x, index, weights, {weight, weight_scale, bias}, rotate);
  activation_kind(kOp, activation);
}

// All but the values of positions.
void check_decoder_layer_op(const Tensor& x, const Tensor& norm, const Tensor& post_norm,
                            const std::vector<Tensor>& weight, const std::vector<Tensor>& weight_scale,
                            const OptionalTensors& bias, const OptionalTensors& input_scale, const Tensor& cos,
                            const Tensor& sin, const Tensor& keys, const Tensor& values, int64_t past,
                            const OptionalTensor& mask, double scale, bool causal, const OpString& activation,
                            const OptionalTensor& keys_scale, const OptionalTensor& values_scale,
                            const OptionalTensor& q_norm, const OptionalTensor& k_norm, const OptionalTensor& positions,
                            const Rotations& rotate) {
  constexpr const char* kOp = "w8a8_decoder_layer_";
  const LayerLists layers{weight, weight_scale, bias};
  check_decoder_layer(kOp, {x, norm, post_norm, layers, input_scale, cos, sin, keys, values, past, mask, scale, causal,
                            keys_scale, values_scale, q_norm, k_norm, positions, rotate});
  activation_kind(kOp, activation);
  for (size_t i = 0; i < kDecoderInputs; ++i) {
    check_static_scale(kOp, decoder_input_scale_name(i), element_of(input_scale, i), "x", x);
  }
}

void check_norm_op(const OpString& op, const Tensor& x, const Tensor& weight) {
  check_norm(op.value.c_str(), x, weight);
}

void check_linear_op(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  check_bf16_linear(x, weight, bias);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CompositeExplicitAutograd, m) {
  m.impl("_check_quantize", TORCH_BOX(&check_quantize));
  m.impl("_check_norm_quantize", TORCH_BOX(&check_norm_quantize_op));
  m.impl("_check_activate_quantize", TORCH_BOX(&check_activate_quantize_op));
  m.impl("_check_gemm", TORCH_BOX(&check_gemm));
  m.impl("_check_w8a8_linear", TORCH_BOX(&check_w8a8_linear));
  m.impl("_check_linear_group", TORCH_BOX(&check_linear_group_op));
  m.impl("_check_mlp", TORCH_BOX(&check_mlp_op));
  m.impl("_check_experts", TORCH_BOX(&check_experts_op));
  m.impl("_check_decoder_layer", TORCH_BOX(&check_decoder_layer_op));
  m.impl("_check_norm", TORCH_BOX(&check_norm_op));
  m.impl("_check_linear", TORCH_BOX(&check_linear_op));
  m.impl("_check_attention", TORCH_BOX(&check_attention));
}

}  // namespace sq
