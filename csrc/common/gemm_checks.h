// Arguments of the ops that multiply 8-bit matrices, for every device.
#pragma once

#include <string>
#include <vector>

#include "common/checks.h"

namespace sq {

// |sum| <= K * 128 * 128 < 2^31 up to here: codes may be -128, though nothing here quantizes to it.
constexpr int64_t kMaxInt8K = 131071;
constexpr int64_t kPackedColumns = 64;  // of one panel of a packed weight, see cpu/kernels/pack.h

inline void check_exact_sums(const char* op, const Tensor& b, int64_t k) {
  SQ_CHECK(b.scalar_type() != ScalarType::Char || k <= kMaxInt8K, op, ": K is ", k,
           ", and int32 sums of int8 products are exact only up to K=", kMaxInt8K);
}

// A weight [N, K] or [E, N, K] alone, as prepack_weight takes it.
inline void check_plain_weight(const char* op, const Tensor& weight) {
  check_8bit(op, "weight", weight.scalar_type());
  SQ_CHECK(weight.dim() == 2 || weight.dim() == 3, op, ": weight has shape ", shape_text(weight),
           ", expected [N, K] or [E, N, K]");
  check_exact_sums(op, weight, weight.size(weight.dim() - 1));
}

struct GemmShape {
  int64_t m, n, k;
  bool is_packed;
};

// The tensors of an 8-bit layer, or of those of all experts.
struct LayerTensors {
  const Tensor& weight;
  const Tensor& scale;
  const OptionalTensor& bias;
};

// What messages call a layer's input and tensors.
struct LayerNames {
  ArgName input = "x", weight = "weight", scale = "weight_scale", bias = "bias";
};

// What prepack_weight makes of [N, K], or of [E, N, K], for an activation of k values and scales of n columns.
inline void check_packed(const char* op, const LayerNames& names, const Tensor& x, int64_t k, const Tensor& weight,
                         int64_t n) {
  const int64_t first = weight.dim() - 4;
  SQ_CHECK(x.is_cpu(), op, ": ", names.weight, " is packed for the CPU kernels, expected ",
           first == 0 ? "" : "E times ", "[N, K] on this device");
  SQ_CHECK(weight.size(first + 2) == kPackedColumns && weight.size(first + 3) == 4 && weight.size(first + 1) % 16 == 1,
           op, ": ", names.weight, " has shape ", shape_text(weight),
           ", expected [N, K] or what prepack_weight returns");
  const int64_t most_n = weight.size(first) * kPackedColumns;
  const int64_t most_k = weight.size(first + 1) / 16 * 64;
  SQ_CHECK(most_n - kPackedColumns < n && n <= most_n, op, ": ", names.scale, " has ", n,
           " elements, expected one a column of the packed ", names.weight, ", which has ", most_n - kPackedColumns + 1,
           " to ", most_n);
  SQ_CHECK(most_k - 64 < k && k <= most_k, op, ": ", names.input, " has K=", k, ", but the packed ", names.weight,
           " has K=", most_k - 63, " to ", most_k);
}

// A layer, plain or packed, whose input has as many rows as x, on the same device, and k values a row.
inline GemmShape check_layer(const char* op, const LayerNames& names, const Tensor& x, int64_t k,
                             const LayerTensors& layer) {
  const Tensor& weight = layer.weight;
  check_8bit(op, names.weight, weight.scalar_type());
  check_same_device(op, names.weight, weight, names.input, x);
  check_same_device(op, names.scale, layer.scale, names.input, x);
  GemmShape shape{row_count(x), 0, k, weight.dim() == 4};
  if (shape.is_packed) {
    check_scale_dtype(op, names.scale, layer.scale);
    shape.n = layer.scale.numel();
    check_packed(op, names, x, k, weight, shape.n);
  } else {
    SQ_CHECK(weight.dim() == 2, op, ": ", names.weight, " has shape ", shape_text(weight),
             ", expected [N, K] or what prepack_weight returns");
    shape.n = weight.size(0);
    SQ_CHECK(weight.size(1) == shape.k, op, ": ", names.input, " has K=", shape.k, ", but ", names.weight,
             " has K=", weight.size(1));
    check_scale(op, names.scale, layer.scale, "N", shape.n);
  }
  check_exact_sums(op, weight, shape.k);
  if (layer.bias.has_value()) {
    const Tensor& bias = *layer.bias;
    check_same_device(op, names.bias, bias, names.input, x);
    check_float(op, names.bias, bias.scalar_type());
    SQ_CHECK(bias.numel() == shape.n, op, ": ", names.bias, " has ", bias.numel(), " elements, expected N=", shape.n);
  }
  return shape;
}

// A layer of x [..., K] itself.
inline GemmShape check_layer(const char* op, const LayerNames& names, const Tensor& x, const LayerTensors& layer) {
  SQ_CHECK(x.dim() >= 1, op, ": ", names.input, " has no dimensions, expected [..., K]");
  return check_layer(op, names, x, x.size(x.dim() - 1), layer);
}

// The 8-bit operands agree: INT8 with INT8, either fp8 with either fp8.
inline void check_operand_dtypes(const char* op, const Tensor& a, const Tensor& b) {
  check_8bit(op, "a", a.scalar_type());
  check_8bit(op, "b", b.scalar_type());
  SQ_CHECK(is_float8(a.scalar_type()) == is_float8(b.scalar_type()), op, ": a is ", dtype_text(a.scalar_type()),
           " and b is ", dtype_text(b.scalar_type()), ", expected both int8 or both float8");
}

inline GemmShape check_w8a8_gemm(const Tensor& a, const Tensor& a_scale, const LayerTensors& layer,
                                 ScalarType out_dtype) {
  constexpr const char* kOp = "w8a8_gemm";
  check_operand_dtypes(kOp, a, layer.weight);
  const GemmShape shape = check_layer(kOp, {"a", "b", "b_scale", "bias"}, a, layer);
  check_same_device(kOp, "a_scale", a_scale, "a", a);
  check_scale(kOp, "a_scale", a_scale, "M", shape.m);
  check_float(kOp, "out_dtype", out_dtype);
  return shape;
}

inline GemmShape check_linear(const char* op, const Tensor& x, const LayerTensors& layer,
                              std::optional<ScalarType> out_dtype, int64_t rotate, const LayerNames& names = {}) {
  check_activation(op, x);
  const GemmShape shape = check_layer(op, names, x, layer);
  check_rotate(op, rotate, shape.k);
  check_float(op, "out_dtype", out_dtype.value_or(x.scalar_type()));
  return shape;
}

// The element of a list of optional tensors, which may be missing or empty.
inline const OptionalTensor& element_of(const OptionalTensors& list, size_t index) {
  static const OptionalTensor kNone;
  return list.has_value() && !list->empty() ? (*list)[index] : kNone;
}

inline void check_optional_list(const char* op, const char* name, const OptionalTensors& list, size_t count) {
  SQ_CHECK(!list.has_value() || list->empty() || list->size() == count, op, ": ", name, " has ", list->size(),
           " elements, expected 0 or ", count);
}

// The layers of an op that takes several, each argument a list of one element a layer.
struct LayerLists {
  const std::vector<Tensor>&weight, &scale;
  const OptionalTensors& bias;

  size_t size() const { return weight.size(); }
  LayerTensors operator[](size_t index) const { return {weight[index], scale[index], element_of(bias, index)}; }
};

inline LayerNames names_in_lists(const ArgName& input, size_t index, const char* role = nullptr) {
  return {input, {"weight", index, role}, {"weight_scale", index, role}, {"bias", index, role}};
}

// That the lists are of one length.
inline void check_lists(const char* op, const LayerLists& layers) {
  const size_t count = layers.size();
  SQ_CHECK(layers.scale.size() == count, op, ": weight_scale has ", layers.scale.size(), " elements, but weight has ",
           count);
  check_optional_list(op, "bias", layers.bias, count);
}

// The layers of w8a8_linear_group.
inline std::vector<GemmShape> check_linear_group(const char* op, const Tensor& x, const LayerLists& layers,
                                                 std::optional<ScalarType> out_dtype, int64_t rotate) {
  check_activation(op, x);
  SQ_CHECK(layers.size() > 0, op, ": weight has no elements, expected at least one");
  check_lists(op, layers);
  const ScalarType dtype = layers.weight[0].scalar_type();
  std::vector<GemmShape> shapes;
  for (size_t i = 0; i < layers.size(); ++i) {
    shapes.push_back(check_linear(op, x, layers[i], out_dtype, rotate, names_in_lists("x", i)));
    const ScalarType own = layers.weight[i].scalar_type();
    SQ_CHECK(own == dtype, op, ": weight[0] is ", dtype_text(dtype), " and weight[", i, "] is ", dtype_text(own),
             ", expected one dtype");
  }
  return shapes;
}

// --- MLPs: (gate, up, down), or (first, down) where there is no gate -------------------------------------------------

struct MlpRole {
  const char* layer;
  const char* input;
};
constexpr MlpRole kGatedRoles[] = {{"gate", "x"}, {"up", "x"}, {"down", "act(gate)"}};
constexpr MlpRole kPlainRoles[] = {{"first", "x"}, {"down", "act(first)"}};
constexpr const char* kGatedInputs[] = {"gate, up", "down"};  // of input_scale and rotate
constexpr const char* kPlainInputs[] = {"first", "down"};

inline bool is_gated(const LayerLists& layers) { return layers.size() == 3; }

inline LayerNames mlp_names(const LayerLists& layers, size_t index) {
  const MlpRole& role = is_gated(layers) ? kGatedRoles[index] : kPlainRoles[index];
  return names_in_lists(role.input, index, role.layer);
}

inline ArgName mlp_input_name(const char* list, const LayerLists& layers, size_t index) {
  return {list, index, is_gated(layers) ? kGatedInputs[index] : kPlainInputs[index]};
}

inline ArgName mlp_input_scale_name(const LayerLists& layers, size_t index) {
  return mlp_input_name("input_scale", layers, index);
}

// Of x [..., k], and of what down reads.
inline void check_mlp_rotations(const char* op, const LayerLists& layers, const Rotations& rotate, int64_t k,
                                int64_t inner) {
  check_rotations(op, rotate, 2);
  check_rotate(op, mlp_input_name("rotate", layers, 0), element_of(rotate, 0), k);
  check_rotate(op, mlp_input_name("rotate", layers, 1), element_of(rotate, 1), inner);
}

inline void check_mlp_lists(const char* op, const LayerLists& layers) {
  SQ_CHECK(layers.size() == 2 || layers.size() == 3, op, ": weight has ", layers.size(),
           " elements, expected 3 (gate, up, down) or 2 (first, down)");
  check_lists(op, layers);
}

// That gate and up fit each other.
inline void check_gate_and_up(const char* op, const LayerNames& gate_names, const LayerTensors& gate, int64_t gate_n,
                              const LayerNames& up_names, const LayerTensors& up, int64_t up_n) {
  SQ_CHECK(up_n == gate_n, op, ": ", up_names.weight, " has N=", up_n, ", but ", gate_names.weight, " has N=", gate_n);
  const ScalarType gate_dtype = gate.weight.scalar_type(), up_dtype = up.weight.scalar_type();
  SQ_CHECK(up_dtype == gate_dtype, op, ": ", up_names.weight, " is ", dtype_text(up_dtype), ", but ", gate_names.weight,
           " is ", dtype_text(gate_dtype));
}

// The layers' shapes, in their order.
inline std::vector<GemmShape> check_mlp(const char* op, const Tensor& x, const LayerLists& layers,
                                        const OptionalTensors& input_scale, const Rotations& rotate) {
  check_activation(op, x);
  check_mlp_lists(op, layers);
  check_optional_list(op, "input_scale", input_scale, 2);
  const size_t down = layers.size() - 1;
  std::vector<GemmShape> shapes;
  for (size_t i = 0; i < down; ++i) shapes.push_back(check_layer(op, mlp_names(layers, i), x, layers[i]));
  if (is_gated(layers)) {
    check_gate_and_up(op, mlp_names(layers, 0), layers[0], shapes[0].n, mlp_names(layers, 1), layers[1], shapes[1].n);
  }
  shapes.push_back(check_layer(op, mlp_names(layers, down), x, shapes[0].n, layers[down]));
  check_mlp_rotations(op, layers, rotate, shapes[0].k, shapes[down].k);
  return shapes;
}

}  // namespace sq
