// Launches of the norms and activations, as quantize.h.
#pragma once

#include "common/activation.h"
#include "cuda/kernels/quantized_rows.h"

namespace sq {

struct NormJob {
  const void *x, *residual;                 // [rows, columns], contiguous; no residual: null
  void* sum;                                // x + residual
  const void *weight, *bias;                // [columns]; no bias: null
  DType x_dtype, weight_dtype, bias_dtype;  // fp32, bf16 or fp16
  float offset;                             // added to the weight
  float eps;
  bool is_layer;
  int64_t rows;  // at most 2^31 - 1
  int64_t columns;
  QuantizedRows target;  // where y is null
  bool is_rounded;       // to x_dtype before it is quantized, as by two ops
  int64_t rotate;        // values of a block that is rotated before it is quantized, or 0
  void* y;               // [rows, columns] of x_dtype
};

struct ActivateJob {
  Activation activation;
  const void *gate, *up;  // [rows, columns], contiguous but for the rows' distance; no up: null
  DType dtype;            // fp32, bf16 or fp16
  int64_t rows;           // at most 2^31 - 1
  int64_t columns;
  int64_t row_step;  // elements from a row of gate, or of up, to the next
  int64_t rotate;    // values of a block that is rotated before it is quantized, or 0
  QuantizedRows target;
};

void launch_norm_rows(const NormJob& job, void* stream);
// shared_bytes: what a block of this device may have, static shared memory taken off.
void launch_activate_rows(const ActivateJob& job, int64_t shared_bytes, void* stream);

}  // namespace sq
