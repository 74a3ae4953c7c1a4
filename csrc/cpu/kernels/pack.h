// The weight layout that every CPU kernel reads, for one-byte types. b [N, K] becomes
//   packed [ceil(N / 64)] [ceil(K / 64) * 16 + 1] [64] [4],   packed[p][k4][n][j] = b[64 p + n][4 k4 + j], zero padded.
// A panel of 64 columns is one sequential stream, and 4 consecutive k of one column are the 4 bytes that one lane of
// vpdpbusd takes. The last k4 row of a panel holds, for INT8, the int32 sums of its 64 columns, and zeros for fp8.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "cpu/kernels/gemm.h"

namespace sq {

// Packs the panels of this range; b is contiguous.
void pack_panels(const uint8_t* b, int64_t n, int64_t k, DType dtype, uint8_t* packed, Range panels);

// Copies rows of k bytes from contiguous rows to rows target_stride bytes apart, XORed with flip.
void copy_rows(const uint8_t* source, int64_t k, uint8_t flip, uint8_t* target, int64_t target_stride, Range rows);

}  // namespace sq
