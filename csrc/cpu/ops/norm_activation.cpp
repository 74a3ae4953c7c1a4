// The ops between the products on the CPU: rms_norm, and norms and activations that quantize what they compute.
#include "common/norm_activation_ops.h"
#include "cpu/compute/norm.h"
#include "cpu/compute/parallel.h"

namespace sq {
namespace {

// q [..., K] and scale [...] of what is in the shape of x, and the arguments of the quantizer that fills them.
struct QuantizeTarget {
  Tensor q, scale;
  QuantizeArgs args{};

  QuantizeTarget(const Tensor& x, ScalarType dtype, float static_scale)
      : q(empty_cpu(shape_of(x), dtype)), scale(empty_cpu(drop_last(x), ScalarType::Float)) {
    args.k = args.q_stride = x.size(x.dim() - 1);
    args.q = static_cast<uint8_t*>(q.mutable_data_ptr());
    args.q_dtype = kernel_dtype(dtype);
    args.scale = static_cast<float*>(scale.mutable_data_ptr());
    args.static_scale = static_scale;
  }
};

Tensor rms_norm_cpu(const Tensor& x_in, const Tensor& weight, double eps, double offset) {
  constexpr const char* kOp = "rms_norm";
  check_norm(kOp, x_in, weight);
  const Tensor x = as_contiguous(x_in);
  Tensor y = empty_cpu(shape_of(x), x.scalar_type());

  NormArgs args{};
  args.k = x.size(x.dim() - 1);
  Plan plan;
  const auto wide_weight = plan.add<float>(args.k);
  Scratch scratch(plan.bytes());
  float* wide = wide_weight.in(scratch);
  widen_channels(weight, offset, wide);
  args.norm = Norm::kRms;
  args.x = x.const_data_ptr();
  args.x_dtype = args.y_dtype = kernel_dtype(x.scalar_type());
  args.weight = wide;
  args.eps = static_cast<float>(eps);
  auto* target = static_cast<uint8_t*>(y.mutable_data_ptr());
  const int64_t row_bytes = args.k * element_size(args.x_dtype);
  parallel_rows(row_count(x), row_bytes, [&](Range range) {
    NormArgs own = args;
    own.y = target + range.begin * row_bytes;
    current_kernels().norm_activation.norm(own, range);
  });
  return y;
}

struct Cpu {
  static QuantizedSum norm_quantize(const char* op, const NormQuantizeInputs& inputs) {
    check_norm_quantize(op, inputs);
    const float static_scale = checked_static_scale(op, "scale", inputs.scale, "x", inputs.x);
    const Tensor x = as_contiguous(inputs.x);
    const OptionalTensor residual = as_contiguous(inputs.residual);
    Tensor sum = empty_cpu(sum_shape(x, residual), x.scalar_type());
    QuantizeTarget target(x, inputs.dtype, static_scale);

    NormArgs args{};
    args.k = target.args.k;
    Plan plan;
    const auto wide_weight = plan.add<float>(args.k), wide_bias = plan.add<float>(args.k);
    Scratch scratch(plan.bytes());
    widen_channels(inputs.weight, inputs.offset, wide_weight.in(scratch));
    if (inputs.bias.has_value())
      widen_channels(*inputs.bias, -0.0, wide_bias.in(scratch));  // x + -0 is x, also for x = -0
    args.norm = inputs.norm;
    args.x = x.const_data_ptr();
    args.residual = residual.has_value() ? residual->const_data_ptr() : nullptr;
    args.x_dtype = kernel_dtype(x.scalar_type());
    args.weight = wide_weight.in(scratch);
    args.bias = inputs.bias.has_value() ? wide_bias.in(scratch) : nullptr;
    args.eps = static_cast<float>(inputs.eps);
    args.sum = sum.mutable_data_ptr();
    args.y_dtype = DType::kFloat32;
    const Kernels& kernels = current_kernels();
    parallel_produce_quantize(kernels.quantize.run, target.args, row_count(x), args.k * element_size(args.x_dtype),
                              [&](Range range, float* values) {
                                NormArgs own = args;
                                own.y = values;
                                kernels.norm_activation.norm(own, range);
                              });
    return {target.q, target.scale, sum};
  }

  static Quantized activate_quantize(const char* op, const ActivateQuantizeInputs& inputs) {
    const char* name = check_activate_quantize(op, inputs);
    const float static_scale = checked_static_scale(op, "scale", inputs.scale, name, inputs.gate);
    const Tensor gate = as_contiguous(inputs.gate);
    const OptionalTensor up = as_contiguous(inputs.up);
    QuantizeTarget target(gate, inputs.dtype, static_scale);
    ActivateArgs args{};
    args.activation = inputs.activation;
    args.k = target.args.k;
    args.gate = gate.const_data_ptr();
    args.up = up.has_value() ? up->const_data_ptr() : nullptr;
    args.dtype = kernel_dtype(gate.scalar_type());
    parallel_activate_quantize(current_kernels(), args, target.args, inputs.rotate, row_count(gate));
    return {target.q, target.scale};
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm_cpu));
  NormActivationOps<Cpu>::implement(m);
}

}  // namespace sq
