// Launches of the quantize kernels: raw device pointers, element types as tags, the stream to run on.
#pragma once

#include <cstdint>

namespace sq {

enum class InputType { kFloat32, kBFloat16, kFloat16 };
enum class QuantizedType { kInt8, kE4M3, kE5M2 };

struct QuantizePerToken {
  const void* x;        // [rows, columns], contiguous
  const float* smooth;  // [columns] or null
  uint8_t* q;           // [rows, columns], bits of the quantized type
  float* scale;         // [rows]
  int64_t rows;         // at most 2^31 - 1
  int64_t columns;
  InputType input;
  QuantizedType quantized;
};

struct QuantizeStatic {
  const void* x;       // [count], contiguous
  const float* scale;  // one element
  uint8_t* q;          // [count]
  int64_t count;
  InputType input;
  QuantizedType quantized;
};

// `stream` is a cudaStream_t. Errors of the launch are left to cudaGetLastError.
void launch_quantize_per_token(const QuantizePerToken& job, void* stream);
void launch_quantize_static(const QuantizeStatic& job, void* stream);

}  // namespace sq
