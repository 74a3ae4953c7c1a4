// The product of 8-bit matrices as other CUDA ops call it: its tensors are checked already.
#pragma once

#include "common/gemm_checks.h"
#include "cuda/compute/launch.h"

namespace sq {

// y [..., N] of a [..., K], 8 bits and contiguous, with one scale or one a row. A residual of the shape and dtype of y,
// contiguous, is added to the rounded y.
Tensor multiply_cuda(const char* op, const Tensor& a, const Tensor& a_scale, const LayerTensors& layer,
                     const GemmShape& shape, ScalarType out_dtype, const OptionalTensor& residual = std::nullopt);

}  // namespace sq
