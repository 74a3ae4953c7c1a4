// The matrix product of every CPU kernel, y[m, n] = cast(sum_k a[m, k] * b[n, k] * (a_scale[m] * b_scale[n]) + bias[n]),
// and the layouts of its operands:
//   a  one byte an element, rows a_stride bytes apart. INT8 is stored as q ^ 0x80, an unsigned number 128 too large, because
//      vpdpbusd and tdpbusd multiply u8 by s8; 128 * (sum of the column of b) is subtracted afterwards. Rows have
//      padded_k(K) readable bytes, and there are padded_rows(M) of them; what is beyond K and M does not count.
//   b  packed, see pack.h.
// int32 sums wrap, so the result is exact as long as the true sum fits: |sum| <= K * 127 * 127 < 2^31 for K <= kMaxK.
#pragma once

#include <cstdint>

#include "dtypes.h"

namespace sq {

constexpr int64_t kMaxK = 133144;
constexpr int64_t kPanel = 64;   // columns of b in a panel, and K is padded to this
constexpr int64_t kRowPad = 64;  // keeps rows of a from being a multiple of 4 KB apart, which would alias cache sets
constexpr uint8_t kOffset = 0x80;

inline int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t padded_rows(int64_t m) { return div_up(m, 32) * 32; }
inline int64_t padded_k(int64_t k) { return div_up(k, kPanel) * kPanel; }
inline int64_t panel_count(int64_t n) { return div_up(n, kPanel); }
inline int64_t panel_bytes(int64_t k) { return (padded_k(k) / 4 + 1) * 4 * kPanel; }

struct Range {
  int64_t begin;
  int64_t end;
};

struct GemmArgs {
  int64_t n, k;
  const uint8_t* a;
  int64_t a_stride;
  DType a_dtype;
  const uint8_t* b;
  DType b_dtype;
  const float* a_scale;
  int64_t a_scale_step;  // 0: one scale for all rows
  const float* b_scale;
  int64_t b_scale_step;  // 0: one scale for all columns
  const void* bias;      // null: none
  DType bias_dtype;
  void* y;  // contiguous rows of n elements
  DType y_dtype;
};

// Computes rows x panels of y; two calls with disjoint ranges may run at the same time.
using GemmRange = void (*)(const GemmArgs& args, Range rows, Range panels);

void gemm_int8_portable(const GemmArgs& args, Range rows, Range panels);
void gemm_fp8_portable(const GemmArgs& args, Range rows, Range panels);
void gemm_int8_avx512vnni(const GemmArgs& args, Range rows, Range panels);
void gemm_int8_amx(const GemmArgs& args, Range rows, Range panels);

}  // namespace sq
