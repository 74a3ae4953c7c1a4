// Passes over rows of floating-point tensors: what stands between the products of a transformer, each in one pass.
//   rms_norm   y = cast(x * (1 / sqrt(sum(x * x) / K + eps)) * (offset + weight))
//   silu_mul   v = gate / (1 + exp(-gate)) * up, left in fp32 for the quantizer
// Every step is one fp32 operation. The sum has kLanes partial sums, lane k % kLanes taking element k, which are added
// pairwise at the end, and exp is a polynomial of plain multiplications and additions: every instruction set gives the
// same bits. Bytes moved: each input once, the output once.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "gemm.h"

namespace sq {

struct RmsNormArgs {
  int64_t k;
  const void* x;        // contiguous rows of k elements
  DType x_dtype;        // of y too
  const float* weight;  // [k], the offset already added
  float eps;
  void* y;
};

struct SiluMulArgs {
  int64_t k;
  const void* gate;  // contiguous rows of k elements
  const void* up;
  DType dtype;
  float* v;  // rows.begin is its first row
};

using RmsNormRows = void (*)(const RmsNormArgs& args, Range rows);
using SiluMulRows = void (*)(const SiluMulArgs& args, Range rows);

void rms_norm_rows_portable(const RmsNormArgs& args, Range rows);
void rms_norm_rows_avx2(const RmsNormArgs& args, Range rows);
void rms_norm_rows_avx512(const RmsNormArgs& args, Range rows);
void silu_mul_rows_portable(const SiluMulArgs& args, Range rows);
void silu_mul_rows_avx2(const SiluMulArgs& args, Range rows);
void silu_mul_rows_avx512(const SiluMulArgs& args, Range rows);

}  // namespace sq
