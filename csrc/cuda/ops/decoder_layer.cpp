// w8a8_decoder_layer_ on CUDA devices, on the current stream, without waiting for it. Its launches, INT8 products by
// cuBLASLt being two each, product and epilogue:
//    1      norm of x, rounded, rotated, quantized                      norm.cuh
//    2, 3   q, k and v                                         one product where their weights lie side by side
//    4      norms of heads, rotation, cache; the mask          decoder_layer.cuh
//    5      attention                                          torch's
//    6      rotated, quantized                                          quantize.cuh
//    7, 8   o
//    9      + x, norm, rounded, rotated, quantized                      norm.cuh
//   10, 11  gate and up                                        one product likewise
//   12      act(gate) * up, rotated, quantized                 activate.cuh
//   13, 14  down, + the sum of 9
// Products of up to 8 rows are one launch each, 10 in all; so are those in FP8 of cuBLASLt on 9.0, where the last addition
// is another launch. An INT8 cache, and several tokens under a mask whose heads of k serve several of q, take one more,
// before the attention: a copy of the cache.
#include <torch/csrc/stable/library.h>

#include "common/op_string.h"
#include "cuda/compute/decoder_attention.h"
#include "cuda/compute/joined_layers.h"
#include "cuda/compute/quantize.h"

namespace sq {
namespace {

constexpr const char* kOp = "w8a8_decoder_layer_";

Tensor w8a8_decoder_layer_cuda(const Tensor& x_in, const Tensor& norm, const Tensor& post_norm, double eps,
                               double post_eps, double offset, const std::vector<Tensor>& weight,
                               const std::vector<Tensor>& weight_scale, const OptionalTensors& bias,
                               const OptionalTensors& input_scale, const Tensor& cos, const Tensor& sin,
                               const Tensor& keys, const Tensor& values, int64_t past, const OptionalTensor& mask,
                               double scale, bool causal, const OpString& activation, const OptionalTensor& keys_scale,
                               const OptionalTensor& values_scale, const OptionalTensor& q_norm,
                               const OptionalTensor& k_norm, double head_eps, const OptionalTensor& positions,
                               const Rotations& rotate) {
  const LayerLists layers{weight, weight_scale, bias};
  const Tensor x = as_contiguous(x_in);
  const DecoderArguments arguments{x,      norm,      post_norm, layers, input_scale, cos,        sin,          keys,
                                   values, past,      mask,      scale,  causal,      keys_scale, values_scale, q_norm,
                                   k_norm, positions, rotate};
  const DecoderShapes shapes = check_decoder_layer(kOp, arguments);
  const Activation kind = activation_kind(kOp, activation);
  const auto static_scale = [&](size_t index) {
    return static_scale_pointer(kOp, decoder_input_scale_name(index), element_of(input_scale, index), "x", x);
  };
  const float *x_scale = static_scale(0), *o_scale = static_scale(1);
  const float *mlp_scale = static_scale(2), *down_scale = static_scale(3);
  const ScalarType dtype = x.scalar_type(), eight_bit = weight[0].scalar_type();
  if (x.numel() == 0) return empty_like_device(x, shape_of(x), dtype);
  const DeviceGuard guard(x.get_device_index());
  const OptionalTensor none;
  const auto normed = [&](const Tensor& of, const Tensor& norm_weight, double own_eps, const OptionalTensor& residual,
                          const float* own_scale, size_t input) {
    return norm_quantize_cuda(kOp, {Norm::kRms, of, norm_weight, none, own_eps, offset, eight_bit, residual, none},
                              own_scale, true, element_of(rotate, input));
  };
  const auto multiplied = [&](const Tensor& q, const Tensor& scales, DecoderRole first, size_t count) {
    return multiply_joined_cuda(kOp, q, scales, layers, shapes.data(), first, count, dtype);
  };

  const auto [n, n_scale, no_sum] = normed(x, norm, eps, none, x_scale, 0);
  const std::vector<Tensor> qkv = multiplied(n, n_scale, kQ, 3);
  const int64_t d = arguments.head_width();
  const HeadCounts counts{x.size(0), x.size(1), shapes[kQ].n / d, shapes[kK].n / d, d};
  const Tensor attended = attend_cuda(kOp, arguments, counts, qkv, offset, head_eps);
  const auto [a, a_scale] = quantize_rows_cuda(kOp, attended, none, o_scale, eight_bit, element_of(rotate, 1));
  const Tensor part = multiply_cuda(kOp, a, a_scale, layers[kO], shapes[kO], dtype);
  const auto [p, p_scale, h] = normed(part, post_norm, post_eps, x, mlp_scale, 2);
  const std::vector<Tensor> gate_up = multiplied(p, p_scale, kGate, 2);
  const auto [hidden, hidden_scale] =
      activate_quantize_cuda(kOp, kind, gate_up[0], gate_up[1], eight_bit, down_scale, element_of(rotate, 3));
  return multiply_cuda(kOp, hidden, hidden_scale, layers[kDown], shapes[kDown], dtype, h);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CUDA, m) { m.impl("w8a8_decoder_layer_", TORCH_BOX(&w8a8_decoder_layer_cuda)); }

}  // namespace sq
