// w8a8_mlp on the CPU.
#include <torch/csrc/stable/library.h>

#include "common/gemm_checks.h"
#include "common/norm_activation_checks.h"
#include "common/op_string.h"
#include "cpu/compute/mlp.h"

namespace sq {
namespace {

constexpr const char* kOp = "w8a8_mlp";

Mlp packed_mlp(const LayerLists& layers, const std::vector<GemmShape>& shapes, Activation activation, float input_scale,
               float down_input_scale, const Rotations& rotate) {
  const size_t down = layers.size() - 1;
  std::optional<PackedWeight> up;
  if (is_gated(layers)) up.emplace(shapes[1], layers[1]);
  return {PackedWeight(shapes[0], layers[0]),
          std::move(up),
          PackedWeight(shapes[down], layers[down]),
          activation,
          input_scale,
          down_input_scale,
          element_of(rotate, 0),
          element_of(rotate, 1)};
}

Tensor w8a8_mlp_cpu(const Tensor& x_in, const std::vector<Tensor>& weight, const std::vector<Tensor>& weight_scale,
                    const OptionalTensors& bias, const OptionalTensors& input_scale, const OpString& activation,
                    const Rotations& rotate) {
  const LayerLists layers{weight, weight_scale, bias};
  const std::vector<GemmShape> shapes = check_mlp(kOp, x_in, layers, input_scale, rotate);
  const auto static_scale = [&](size_t index) {
    return checked_static_scale(kOp, mlp_input_scale_name(layers, index), element_of(input_scale, index), "x", x_in);
  };
  const Mlp mlp =
      packed_mlp(layers, shapes, activation_kind(kOp, activation), static_scale(0), static_scale(1), rotate);
  const Tensor x = as_contiguous(x_in);
  Tensor y = empty_cpu(replace_last(x, mlp.down.n()), x.scalar_type());
  mlp.run(current_kernels(), x.const_data_ptr(), row_count(x), kernel_dtype(x.scalar_type()), y.mutable_data_ptr());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CPU, m) { m.impl("w8a8_mlp", TORCH_BOX(&w8a8_mlp_cpu)); }

}  // namespace sq
