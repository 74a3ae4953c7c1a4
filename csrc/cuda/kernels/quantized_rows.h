// Where the rows of a quantizing kernel go.
#pragma once

#include <cstdint>

#include "common/dtypes.h"

namespace sq {

struct QuantizedRows {
  uint8_t* q;                 // [rows, columns], bits of the quantized type
  float* scale;               // [rows]
  const float* static_scale;  // one element, or null for a scale per row
  DType dtype;                // int8 or fp8
};

}  // namespace sq
