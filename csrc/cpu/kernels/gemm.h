// The matrix product of every CPU kernel, y[m, n] = cast(sum_k a[m, k] * b[n, k] * (a_scale[m] * b_scale[n]) + bias[n]),
// and the layouts of its operands:
//   a  rows a_stride bytes apart, with padded_k(K) readable values; there are padded_rows(M) rows to read, and what is in
//      those beyond M does not count.
//      INT8: one byte a value, q ^ 0x80: an unsigned number 128 too large, because vpdpbusd and tdpbusd multiply u8 by s8.
//      128 * (sum of the column of b) is subtracted afterwards. Bytes beyond K do not count.
//      FP8: widened, by the kernel's own function, to fp32 or bf16, which hold every fp8 value; 0 beyond K.
//   b  packed, see pack.h.
// int32 sums wrap, so the result is exact as long as the true sum fits: |sum| <= K * 128 * 128 < 2^31 for K <= 131071.
#pragma once

#include <cstdint>

#include "common/dtypes.h"

namespace sq {

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

// Rows that lie `stride` elements apart.
template <class T>
struct Strided {
  T* data;
  int64_t stride;
};

struct GemmArgs {
  int64_t m;  // rows of a: a kernel that sums in another order for few rows decides by these, not by those of a range
  int64_t n, k;
  const uint8_t* a;
  int64_t a_stride;  // bytes
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

// Widens rows of fp8 values, k of them q_stride bytes apart, to the type that the kernel multiplies.
struct WidenArgs {
  int64_t k;
  const uint8_t* q;
  int64_t q_stride;  // bytes
  DType dtype;
  uint8_t* wide;
  int64_t wide_stride;  // bytes
};
using WidenRows = void (*)(const WidenArgs& args, Range rows);

// The values of fp8 as fp32, for kernels that have no better.
void widen_fp32_portable(const WidenArgs& args, Range rows);

// The product of one type with one instruction set; each is defined in the file of its kernel.
struct GemmKernels {
  const char* name;
  GemmRange run;
  int64_t block_bytes;   // of activation that a thread should multiply at a time, so that it stays in L2
  WidenRows widen;       // null in INT8
  int64_t element_size;  // of what the product reads
};

extern const GemmKernels kInt8Portable, kInt8Avx2, kInt8AvxVnni, kInt8Avx512Vnni, kInt8Amx;
// Blocks are larger where every block decodes the weight anew.
extern const GemmKernels kFp8Portable, kFp8Avx2, kFp8Avx512, kFp8Avx512Bf16, kFp8Amx;

}  // namespace sq
