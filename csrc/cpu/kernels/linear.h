// A product of few rows with a bf16 weight as torch stores it, y[m, n] = bf16(sum_k x[m, k] * w[n, k] + bias[n]), for what
// stays in floating point: the output embedding, which a decode step reads once. The weight is a sequential stream read
// once per call, whatever the number of rows; x stays in cache. Sums are fp32; their order is each kernel's own.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "cpu/kernels/gemm.h"

namespace sq {

struct LinearArgs {
  int64_t m, n, k;
  const BFloat16* x;     // [m, k]
  const BFloat16* w;     // [n, k]
  const BFloat16* bias;  // [n], or null
  BFloat16* y;           // [m, n]
};

// Columns that belong together: ranges begin with a multiple of them, so that every thread count gives the same bits.
constexpr int64_t kLinearColumns = 32;

// Computes these columns of y; calls with disjoint ranges may run at the same time.
using LinearColumns = void (*)(const LinearArgs& args, Range columns);

struct LinearKernels {
  const char* name;
  LinearColumns run;
};

extern const LinearKernels kLinearPortable, kLinearAvx512Bf16, kLinearAmx;

}  // namespace sq
