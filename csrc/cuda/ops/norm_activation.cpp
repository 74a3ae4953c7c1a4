// The ops between the products on CUDA devices: rms_norm, and norms and activations that quantize what they compute.
#include "common/norm_activation_ops.h"
#include "cuda/compute/quantize.h"

namespace sq {

namespace {

Tensor rms_norm_cuda(const Tensor& x_in, const Tensor& weight_in, double eps, double offset) {
  constexpr const char* kOp = "rms_norm";
  check_norm(kOp, x_in, weight_in);
  const DeviceGuard guard(x_in.get_device_index());
  const Tensor x = as_contiguous(x_in), weight = as_contiguous(weight_in);
  Tensor y = empty_like_device(x, shape_of(x), x.scalar_type());
  if (y.numel() == 0) return y;  // and has no address, which is how the kernel knows that it need not quantize
  NormJob job = norm_job(x, weight, eps, offset);
  job.y = y.mutable_data_ptr();
  launch_norm(kOp, job, x);
  return y;
}

struct Cuda {
  static QuantizedSum norm_quantize(const char* op, const NormQuantizeInputs& inputs) {
    const Tensor& x_in = inputs.x;
    check_norm_quantize(op, inputs);
    const float* static_scale = static_scale_pointer(op, "scale", inputs.scale, "x", x_in);
    const DeviceGuard guard(x_in.get_device_index());
    return norm_quantize_cuda(op, inputs, static_scale);
  }

  static Quantized activate_quantize(const char* op, const ActivateQuantizeInputs& inputs) {
    const Tensor& gate = inputs.gate;
    const char* name = check_activate_quantize(op, inputs);
    const float* static_scale = static_scale_pointer(op, "scale", inputs.scale, name, gate);
    const DeviceGuard guard(gate.get_device_index());
    return activate_quantize_cuda(op, inputs.activation, as_contiguous(gate), as_contiguous(inputs.up), inputs.dtype,
                                  static_scale, inputs.rotate);
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CUDA, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm_cuda));
  NormActivationOps<Cuda>::implement(m);
}

}  // namespace sq
