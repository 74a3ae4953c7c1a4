// The bodies of rows.h in plain C++, for the compiler to vectorize: rows_portable.cpp and rows_avx512.cpp compile them for
// their instruction set, which SQ_ROWS names.
#include <cmath>

#include "rows.h"

#define SQ_ROWS_INLINE inline __attribute__((always_inline))

namespace sq {
namespace {

constexpr int64_t kLanes = 16;

template <class T>
SQ_ROWS_INLINE float sum_of_squares(const T* x, int64_t k) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float value = to_float(x[i + lane]);
      lanes[lane] += value * value;
    }
  }
  for (int64_t lane = 0; i + lane < k; ++lane) {
    const float value = to_float(x[i + lane]);
    lanes[lane] += value * value;
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

template <class T>
SQ_ROWS_INLINE void rms_norm_rows(const RmsNormArgs& args, Range rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * args.k;
    T* y = static_cast<T*>(args.y) + row * args.k;
    const float mean = sum_of_squares(x, args.k) / static_cast<float>(args.k);
    const float gain = 1.0f / std::sqrt(mean + args.eps);
    for (int64_t i = 0; i < args.k; ++i) from_float(to_float(x[i]) * gain * args.weight[i], y + i);
  }
}

// Cephes' expf: x = n ln 2 + r, e^x = 2^n e^r, with ln 2 in two parts and a polynomial for |r| <= ln 2 / 2. The error is
// under 2 ulp. Saturates where 2^n would leave fp32's normal numbers; a NaN stays.
SQ_ROWS_INLINE float exp_polynomial(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the low bits
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const float r = x - n * 0.693359375f - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return p * float_from_bits((float_bits(shifted) + 127) << 23);
}

template <class T>
SQ_ROWS_INLINE void silu_mul_rows(const SiluMulArgs& args, Range rows) {
  const int64_t begin = rows.begin * args.k, count = (rows.end - rows.begin) * args.k;
  const T* gate = static_cast<const T*>(args.gate) + begin;
  const T* up = static_cast<const T*>(args.up) + begin;
  float* v = args.v;
  for (int64_t i = 0; i < count; ++i) {
    const float g = to_float(gate[i]);
    v[i] = g / (1.0f + exp_polynomial(-g)) * to_float(up[i]);
  }
}

}  // namespace

SQ_ROWS_TARGET void SQ_ROWS(rms_norm_rows)(const RmsNormArgs& args, Range rows) {
  switch (args.x_dtype) {
    case DType::kBFloat16:
      return rms_norm_rows<BFloat16>(args, rows);
    case DType::kFloat16:
      return rms_norm_rows<Float16>(args, rows);
    default:
      return rms_norm_rows<float>(args, rows);
  }
}

SQ_ROWS_TARGET void SQ_ROWS(silu_mul_rows)(const SiluMulArgs& args, Range rows) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return silu_mul_rows<BFloat16>(args, rows);
    case DType::kFloat16:
      return silu_mul_rows<Float16>(args, rows);
    default:
      return silu_mul_rows<float>(args, rows);
  }
}

}  // namespace sq
