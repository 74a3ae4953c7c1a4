// Rows of x (fp32, bf16 or fp16) to one byte an element, v = x or x / smooth, every step one fp32 operation:
//   per token:  scale = absmax(v) / qmax;  q = round_half_even(v * min(qmax / absmax, FLT_MAX))
//               absmax 0: scale 1, q 0.  A non-finite v in the row: scale NaN, q 0.
//   static:     q = round_half_even(v * (1 / static_scale)), clamped to +-qmax
//               with `scale` given, a row with a non-finite v gets scale NaN and q 0, other rows the static scale;
//               without it NaN becomes 0 in INT8 and NaN in fp8, and infinity saturates.
// The min keeps rows of subnormals from 0 * inf. Reads x twice, the second time from cache.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "common/row_scale.h"
#include "cpu/kernels/gemm.h"

namespace sq {

struct QuantizeArgs {
  int64_t k;
  const void* x;  // contiguous rows of k elements
  DType x_dtype;
  const float* smooth;  // [k], or null
  uint8_t* q;
  int64_t q_stride;  // bytes
  DType q_dtype;
  uint8_t flip;        // XORed into every q: 0, or kOffset for gemm.h's INT8 operand
  float* scale;        // one a row; may be null when static
  float static_scale;  // 0: per token
};

// From the bits of the row's largest magnitude, which are those of infinity or more if a value is not finite. For a static
// scale without `scale` output, rows are not looked at: any finite bits will do.
inline RowScale row_scale(const QuantizeArgs& args, uint32_t absmax_bits) {
  if (args.static_scale != 0.0f && absmax_bits < kFloatInf) return {args.static_scale, 1.0f / args.static_scale};
  return per_token_scale(absmax_bits, quantized_max(args.q_dtype));
}

using QuantizeRows = void (*)(const QuantizeArgs& args, Range rows);

struct QuantizeKernels {
  const char* name;
  QuantizeRows run;
};

extern const QuantizeKernels kQuantizePortable, kQuantizeAvx2, kQuantizeAvx512;

}  // namespace sq
