// Arguments of the ops that multiply, for every device.
#pragma once

#include <string>
#include <vector>

#include "rows_args.h"

namespace sq {

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
                              std::optional<ScalarType> out_dtype, const LayerNames& names = {}) {
  check_activation(op, x);
  const GemmShape shape = check_layer(op, names, x, layer);
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
                                                 std::optional<ScalarType> out_dtype) {
  check_activation(op, x);
  SQ_CHECK(layers.size() > 0, op, ": weight has no elements, expected at least one");
  check_lists(op, layers);
  const ScalarType dtype = layers.weight[0].scalar_type();
  std::vector<GemmShape> shapes;
  for (size_t i = 0; i < layers.size(); ++i) {
    shapes.push_back(check_linear(op, x, layers[i], out_dtype, names_in_lists("x", i)));
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
constexpr const char* kGatedInputs[] = {"gate, up", "down"};  // of input_scale
constexpr const char* kPlainInputs[] = {"first", "down"};

inline bool is_gated(const LayerLists& layers) { return layers.size() == 3; }

inline LayerNames mlp_names(const LayerLists& layers, size_t index) {
  const MlpRole& role = is_gated(layers) ? kGatedRoles[index] : kPlainRoles[index];
  return names_in_lists(role.input, index, role.layer);
}

inline ArgName mlp_input_scale_name(const LayerLists& layers, size_t index) {
  return {"input_scale", index, is_gated(layers) ? kGatedInputs[index] : kPlainInputs[index]};
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
                                        const OptionalTensors& input_scale) {
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
  return shapes;
}

}  // namespace sq
