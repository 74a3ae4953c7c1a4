// What the CPU kernels and the CUDA ones agree on for a row: the order of its sums, and its scale from its absmax.
#pragma once

#include <cfloat>

#include "common/dtypes.h"

namespace sq {

// Partial sums of a norm's row: enough to hide the latency of an addition, in a vector unit as in a GPU's two warps.
constexpr int64_t kSumLanes = 64;

struct RowScale {
  float scale;
  float multiplier;  // of v; 0: all q of the row are 0
};

// From the bits of the largest magnitude: as integers they order like magnitudes, infinity is above all finite ones and
// NaN above infinity.
SQ_HOST_DEVICE inline RowScale per_token_scale(uint32_t absmax_bits, float qmax) {
  if (absmax_bits >= kFloatInf) return {float_from_bits(0x7FC00000), 0.0f};
  if (absmax_bits == 0) return {1.0f, 0.0f};
  const float absmax = float_from_bits(absmax_bits);
  const float multiplier = qmax / absmax;
  return {absmax / qmax, multiplier < FLT_MAX ? multiplier : FLT_MAX};
}

}  // namespace sq
