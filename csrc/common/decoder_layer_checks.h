// Arguments of w8a8_decoder_layer_, for every device.
#pragma once

#include <array>

#include "common/attention_checks.h"
#include "common/gemm_checks.h"
#include "common/norm_activation_checks.h"

namespace sq {

enum DecoderRole { kQ, kK, kV, kO, kGate, kUp, kDown, kDecoderLayers };

// As the op has them.
struct DecoderArguments {
  const Tensor &x, &norm, &post_norm;
  LayerLists layers;
  const OptionalTensors& input_scale;
  const Tensor &cos, &sin, &keys, &values;
  int64_t past;
  const OptionalTensor& mask;
  double scale;
  bool causal;
  const OptionalTensor &keys_scale, &values_scale, &q_norm, &k_norm, &positions;
  const Rotations& rotate;

  int64_t width() const { return x.size(2); }
  int64_t head_width() const { return cos.size(2); }
  // Tokens that are attended to: with positions all that there is room for, since their values are not looked at.
  int64_t length() const { return positions.has_value() ? keys.size(2) : past + x.size(1); }
};

using DecoderShapes = std::array<GemmShape, kDecoderLayers>;

constexpr size_t kDecoderInputs = 4;
inline ArgName decoder_input_name(const char* list, size_t index) {
  constexpr const char* kReaders[kDecoderInputs] = {"q, k, v", "o", "gate, up", "down"};
  return {list, index, kReaders[index]};
}

inline ArgName decoder_input_scale_name(size_t index) { return decoder_input_name("input_scale", index); }

inline LayerNames decoder_names(size_t index) {
  constexpr MlpRole kRoles[kDecoderLayers] = {{"q", "x"},    {"k", "x"},  {"v", "x"},           {"o", "attention"},
                                              {"gate", "x"}, {"up", "x"}, {"down", "act(gate)"}};
  return names_in_lists(kRoles[index].input, index, kRoles[index].layer);
}

inline void check_angles(const char* op, const char* name, const Tensor& angles, const Tensor& x) {
  check_same_device(op, name, angles, "x", x);
  SQ_CHECK(angles.scalar_type() == x.scalar_type(), op, ": ", name, " is ", dtype_text(angles.scalar_type()),
           " and x is ", dtype_text(x.scalar_type()), ", expected the same dtype");
  SQ_CHECK(angles.dim() == 3 && (angles.size(0) == 1 || angles.size(0) == x.size(0)) && angles.size(1) == x.size(1) &&
               angles.size(2) % 2 == 0 && angles.size(2) > 0,
           op, ": ", name, " has shape ", shape_text(angles), ", expected [1 or B, T, D] with an even D");
}

inline void check_decoder_norms(const char* op, const DecoderArguments& arguments) {
  const Tensor& x = arguments.x;
  check_channels(op, "norm", arguments.norm, x);
  check_channels(op, "post_norm", arguments.post_norm, x);
  check_angles(op, "cos", arguments.cos, x);
  check_angles(op, "sin", arguments.sin, x);
  const OptionalTensor &q_norm = arguments.q_norm, &k_norm = arguments.k_norm;
  SQ_CHECK(q_norm.has_value() == k_norm.has_value(), op,
           ": one of q_norm and k_norm is given, expected both or neither");
  if (!q_norm.has_value()) return;
  check_channels(op, "q_norm", *q_norm, x, "D", arguments.head_width());
  check_channels(op, "k_norm", *k_norm, x, "D", arguments.head_width());
}

inline DecoderShapes check_decoder_layers(const char* op, const DecoderArguments& arguments) {
  const LayerLists& layers = arguments.layers;
  SQ_CHECK(layers.size() == kDecoderLayers, op, ": weight has ", layers.size(),
           " elements, expected 7 (q, k, v, o, gate, up, down)");
  check_lists(op, layers);
  check_optional_list(op, "input_scale", arguments.input_scale, kDecoderInputs);
  const ScalarType dtype = layers.weight[0].scalar_type();
  const int64_t k = arguments.width(), d = arguments.head_width();
  DecoderShapes shapes{};
  for (size_t i = 0; i < kDecoderLayers; ++i) {
    const LayerNames names = decoder_names(i);
    const ScalarType own = layers.weight[i].scalar_type();
    SQ_CHECK(own == dtype, op, ": weight[0] (q) is ", dtype_text(dtype), " and ", names.weight, " is ", dtype_text(own),
             ", expected one dtype");
    const int64_t read = i == kO ? shapes[kQ].n : i == kDown ? shapes[kGate].n : k;
    shapes[i] = check_layer(op, names, arguments.x, read, layers[i]);
  }
  const int64_t q_n = shapes[kQ].n, k_n = shapes[kK].n, v_n = shapes[kV].n;
  SQ_CHECK(q_n % d == 0 && k_n % d == 0 && k_n > 0 && q_n % k_n == 0 && v_n == k_n, op, ": q, k and v have N=", q_n,
           ", ", k_n, " and ", v_n, ", expected multiples of D=", d);
  SQ_CHECK(shapes[kUp].n == shapes[kGate].n, op, ": weight[5] (up) has N=", shapes[kUp].n,
           ", but weight[4] (gate) has N=", shapes[kGate].n);
  SQ_CHECK(shapes[kO].n == k && shapes[kDown].n == k, op, ": o and down have N=", shapes[kO].n, " and ",
           shapes[kDown].n, ", expected K=", k);
  return shapes;
}

// Where the new tokens go, if not behind `past`.
inline void check_positions(const char* op, const DecoderArguments& arguments) {
  const Tensor& x = arguments.x;
  if (!arguments.positions.has_value()) {
    SQ_CHECK(arguments.past >= 0, op, ": past is ", arguments.past, ", expected 0 or more");
    return;
  }
  const Tensor& positions = *arguments.positions;
  check_same_device(op, "positions", positions, "x", x);
  SQ_CHECK(positions.scalar_type() == ScalarType::Long, op, ": positions is ", dtype_text(positions.scalar_type()),
           ", expected int64");
  SQ_CHECK(positions.dim() == 1 && positions.size(0) == x.size(1), op, ": positions has shape ", shape_text(positions),
           ", expected [T=", x.size(1), "]");
  SQ_CHECK(arguments.mask.has_value() || arguments.causal, op,
           ": positions is given, and neither mask nor causal hides what was not written yet");
  SQ_CHECK(
      arguments.keys.dim() == 4 && arguments.values.dim() == 4 && arguments.keys.size(2) == arguments.values.size(2),
      op, ": positions is given, keys has shape ", shape_text(arguments.keys), " and values ",
      shape_text(arguments.values), ", expected [B, Hkv, room, D] of the same room");
}

// A cache for x's batches that has room for `total` tokens, and its scales if it is INT8.
struct CacheNames {
  const char *buffer, *scale;
};
inline void check_cache(const char* op, const CacheNames& names, const Tensor& buffer, const OptionalTensor& scale,
                        const DecoderArguments& arguments, int64_t kv_heads) {
  const Tensor& x = arguments.x;
  const int64_t total = arguments.positions.has_value() ? x.size(1) : arguments.length();
  const int64_t d = arguments.head_width();
  check_key_dtype(op, names.buffer, buffer, scale.has_value(), "x", x);
  SQ_CHECK(buffer.dim() == 4 && buffer.is_contiguous() && buffer.size(0) == x.size(0) && buffer.size(1) == kv_heads &&
               buffer.size(2) >= total && buffer.size(3) == d,
           op, ": ", names.buffer, " has shape ", shape_text(buffer), ", expected contiguous [", x.size(0), ", ",
           kv_heads, ", ", total, " or more, ", d, "]");
  if (scale.has_value()) check_head_scale(op, names.scale, *scale, buffer, "x", x, "contiguous ");
}

// All but the values of the static scales.
inline DecoderShapes check_decoder_layer(const char* op, const DecoderArguments& arguments) {
  const Tensor& x = arguments.x;
  check_float(op, "x", x.scalar_type());
  SQ_CHECK(x.dim() == 3, op, ": x has shape ", shape_text(x), ", expected [B, T, K]");
  check_positions(op, arguments);
  check_score_scale(op, arguments.scale);
  check_decoder_norms(op, arguments);
  const DecoderShapes shapes = check_decoder_layers(op, arguments);
  check_rotations(op, arguments.rotate, kDecoderInputs);
  constexpr DecoderRole kFirstReaders[kDecoderInputs] = {kQ, kO, kGate, kDown};
  for (size_t i = 0; i < kDecoderInputs; ++i) {
    check_rotate(op, decoder_input_name("rotate", i), element_of(arguments.rotate, i), shapes[kFirstReaders[i]].k);
  }
  const int64_t d = arguments.head_width(), kv_heads = shapes[kK].n / d;
  SQ_CHECK(arguments.keys_scale.has_value() == arguments.values_scale.has_value(), op,
           ": one of keys_scale and values_scale is given, expected both or neither");
  check_cache(op, {"keys", "keys_scale"}, arguments.keys, arguments.keys_scale, arguments, kv_heads);
  check_cache(op, {"values", "values_scale"}, arguments.values, arguments.values_scale, arguments, kv_heads);
  if (arguments.mask.has_value()) {
    check_mask(op, *arguments.mask, {x.size(0), shapes[kQ].n / d, x.size(1), arguments.length()}, "x", x);
  }
  return shapes;
}

}  // namespace sq
