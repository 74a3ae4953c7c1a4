// Launches of what the CUDA products consist of besides cuBLASLt's matrix products, as quantize.h.
#pragma once

#include <cstdint>

#include "common/dtypes.h"

namespace sq {

// The last step of every product: y[m, n] = cast(float(sum[m, n]) * (a_scale[m] * b_scale[n]) + bias[n]), every operation
// one fp32 operation; then, where there is a residual, y = cast(y + residual), as of two ops.
struct Epilogue {
  int64_t m, n;
  const float* a_scale;
  const float* b_scale;
  int a_scale_step, b_scale_step;  // 0: one for all
  const void* bias;                // [n], or null
  DType bias_dtype;                // fp32, bf16 or fp16
  void* y;                         // [m, n], contiguous
  DType y_dtype;                   // fp32, bf16 or fp16
  const void* residual;            // [m, n] of y_dtype, contiguous, or null
};

struct SkinnyJob {
  const uint8_t *a, *b;    // [m, k] and [n, k], contiguous
  DType a_dtype, b_dtype;  // both int8, or either fp8
  int64_t k;
  Epilogue epilogue;
};

struct EpilogueJob {
  const void* sums;  // [splits, m, n], contiguous, int32 or fp32
  int splits;        // which are added, the first first
  bool is_int32;
  Epilogue epilogue;
};

struct WidenJob {
  const uint8_t* q;  // [count]
  DType dtype;       // fp8
  BFloat16* wide;    // [count]
  int64_t count;
};

struct ScalesJob {
  const float *a, *b;
  int a_step, b_step;  // 0: one for all
  int64_t m, n;
  float *a_vector, *b_vector;  // [m] and [n]
};

void launch_skinny_gemm(const SkinnyJob& job, void* stream);
void launch_epilogue(const EpilogueJob& job, void* stream);
void launch_widen(const WidenJob& job, void* stream);
// y += residual, after a product that did not go through our epilogue; nothing where there is none.
void launch_add_residual(const Epilogue& epilogue, void* stream);
void launch_align_scales(const ScalesJob& job, void* stream);

// What the launches can index: blocks of 8 rows and 4 columns.
constexpr int64_t kSkinnyRows = 8, kSkinnyColumns = 4;
constexpr int64_t skinny_blocks(int64_t m, int64_t n) {
  return (m + kSkinnyRows - 1) / kSkinnyRows * ((n + kSkinnyColumns - 1) / kSkinnyColumns);
}

}  // namespace sq
