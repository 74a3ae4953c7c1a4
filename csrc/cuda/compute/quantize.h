// The quantizing steps as other ops call them: their tensors are checked already.
#pragma once

#include "common/norm_activation_checks.h"
#include "cuda/compute/launch.h"
#include "cuda/kernels/norm_activation.h"

namespace sq {

// q [..., K] and scale [...] of what has the shape of x, and where a kernel writes them.
struct QuantizeTarget {
  Tensor q, scale;
  QuantizedRows rows;

  QuantizeTarget(const Tensor& x, ScalarType dtype, const float* static_scale)
      : q(empty_like_device(x, shape_of(x), dtype)),
        scale(empty_like_device(x, drop_last(x), ScalarType::Float)),
        rows{static_cast<uint8_t*>(q.mutable_data_ptr()), static_cast<float*>(scale.mutable_data_ptr()), static_scale,
             kernel_dtype(dtype)} {}
};

// Of a contiguous x, with a scale per row or a static one. rotate, here and below: values of a block that is rotated
// before it is quantized, or 0.
Quantized quantize_rows_cuda(const char* op, const Tensor& x, const OptionalTensor& smooth, const float* static_scale,
                             ScalarType dtype, int64_t rotate);

// Of act(gate), or act(gate) * up; contiguous, or halves of the rows of one contiguous tensor.
Quantized activate_quantize_cuda(const char* op, Activation activation, const Tensor& gate, const OptionalTensor& up,
                                 ScalarType dtype, const float* static_scale, int64_t rotate);

// What a norm without a target does.
NormJob norm_job(const Tensor& x, const Tensor& weight, double eps, double offset);
void launch_norm(const char* op, const NormJob& job, const Tensor& x);

// Of a norm, rounded to the dtype of x and rotated before if that is wanted; the third result is x + residual.
QuantizedSum norm_quantize_cuda(const char* op, const NormQuantizeInputs& inputs, const float* static_scale,
                                bool is_rounded = false, int64_t rotate = 0);

}  // namespace sq
