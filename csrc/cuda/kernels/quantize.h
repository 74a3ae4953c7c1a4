// Launches of the quantize kernels: raw device pointers, element types as tags, the stream to run on.
#pragma once

#include "cuda/kernels/quantized_rows.h"

namespace sq {

struct QuantizeRowsJob {
  const void* x;        // [rows, columns], contiguous
  const float* smooth;  // [columns] or null
  QuantizedRows target;
  int64_t rows;  // at most 2^31 - 1
  int64_t columns;
  int64_t rotate;  // values of a block that is rotated first, or 0
  DType x_dtype;   // fp32, bf16 or fp16
};

struct QuantizeStaticJob {
  const void* x;       // [count], contiguous
  const float* scale;  // one element
  uint8_t* q;          // [count]
  int64_t count;
  int64_t rotate;  // as above; divides what count counts
  DType x_dtype;   // fp32, bf16 or fp16
  DType q_dtype;   // int8 or fp8
};

// `stream` is a cudaStream_t. Errors of the launch are left to cudaGetLastError.
void launch_quantize_rows(const QuantizeRowsJob& job, void* stream);
void launch_quantize_static(const QuantizeStaticJob& job, void* stream);

}  // namespace sq
