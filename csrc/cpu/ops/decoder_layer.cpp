// w8a8_decoder_layer_ on the CPU.
#include <torch/csrc/stable/library.h>

#include "common/decoder_layer_checks.h"
#include "common/op_string.h"
#include "cpu/compute/decoder_layer.h"

namespace sq {
namespace {

constexpr const char* kOp = "w8a8_decoder_layer_";

// The tokens in front of the new ones, of which there is at least one: their positions have to follow one another.
int64_t first_of(const Tensor& positions_in, int64_t room) {
  const Tensor positions = as_contiguous(positions_in);
  const auto* values = pointer<int64_t>(positions);
  const int64_t count = positions.numel();
  SQ_CHECK(values[0] >= 0 && values[0] <= room - count, kOp, ": positions begins with ", values[0],
           ", expected 0 to room - T=", room - count);
  for (int64_t i = 1; i < count; ++i) {
    SQ_CHECK(values[i] == values[0] + i, kOp, ": positions[", i, "] is ", values[i], " and positions[0] is ", values[0],
             ", expected one after the other on the CPU");
  }
  return values[0];
}

Tensor w8a8_decoder_layer_cpu(const Tensor& x_in, const Tensor& norm, const Tensor& post_norm, double eps,
                              double post_eps, double offset, const std::vector<Tensor>& weight,
                              const std::vector<Tensor>& weight_scale, const OptionalTensors& bias,
                              const OptionalTensors& input_scale, const Tensor& cos_in, const Tensor& sin_in,
                              const Tensor& keys, const Tensor& values, int64_t past, const OptionalTensor& mask_in,
                              double scale, bool causal, const OpString& activation, const OptionalTensor& keys_scale,
                              const OptionalTensor& values_scale, const OptionalTensor& q_norm,
                              const OptionalTensor& k_norm, double head_eps, const OptionalTensor& positions,
                              const Rotations& rotate) {
  const LayerLists layers{weight, weight_scale, bias};
  const DecoderShapes shapes =
      check_decoder_layer(kOp, {x_in, norm, post_norm, layers, input_scale, cos_in, sin_in, keys, values, past, mask_in,
                                scale, causal, keys_scale, values_scale, q_norm, k_norm, positions, rotate});
  const auto packed = [&](DecoderRole role) { return PackedWeight(shapes[role], layers[role]); };
  const auto static_scale = [&](size_t index) {
    return checked_static_scale(kOp, decoder_input_scale_name(index), element_of(input_scale, index), "x", x_in);
  };
  const DecoderLayer layer{packed(kQ),
                           packed(kK),
                           packed(kV),
                           packed(kO),
                           {packed(kGate), packed(kUp), packed(kDown), activation_kind(kOp, activation),
                            static_scale(2), static_scale(3), element_of(rotate, 2), element_of(rotate, 3)},
                           {norm, post_norm, q_norm, k_norm, static_cast<float>(eps), static_cast<float>(post_eps),
                            static_cast<float>(head_eps), offset},
                           static_scale(0),
                           static_scale(1),
                           element_of(rotate, 0),
                           element_of(rotate, 1),
                           cos_in.size(2)};

  const Tensor x = as_contiguous(x_in), cos = as_contiguous(cos_in), sin = as_contiguous(sin_in);
  const OptionalTensor mask = as_contiguous(mask_in);
  Tensor y = empty_cpu(shape_of(x), x.scalar_type());
  const DType dtype = kernel_dtype(x.scalar_type());
  DecoderTokens tokens{};
  tokens.batch = x.size(0);
  tokens.time = x.size(1);
  const bool has_positions = positions.has_value() && tokens.rows() > 0;
  tokens.past = has_positions ? first_of(*positions, keys.size(2)) : past;
  // Nothing behind the new tokens is seen if that is causal.
  tokens.length = has_positions && !causal ? keys.size(2) : tokens.past + tokens.time;
  tokens.x = x.const_data_ptr();
  tokens.dtype = dtype;
  tokens.y = y.mutable_data_ptr();
  tokens.cos = cos.const_data_ptr();
  tokens.sin = sin.const_data_ptr();
  tokens.has_one_angle_batch = cos.size(0) == 1;
  tokens.mask = pointer<uint8_t>(mask);
  if (mask.has_value()) tokens.mask_strides = strides_of(*mask);
  tokens.scale = static_cast<float>(scale);
  tokens.causal = causal;
  layer.run(current_kernels(), tokens, CacheBuffer(keys, keys_scale, dtype), CacheBuffer(values, values_scale, dtype));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CPU, m) { m.impl("w8a8_decoder_layer_", TORCH_BOX(&w8a8_decoder_layer_cpu)); }

}  // namespace sq
