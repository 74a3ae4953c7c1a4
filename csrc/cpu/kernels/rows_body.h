// The bodies of rows.h in plain C++, for the compiler to vectorize: rows_portable.cpp and rows_avx512.cpp compile them for
// their instruction set, which SQ_ROWS names.
#include <cmath>

#include "rows.h"

#define SQ_ROWS_INLINE inline __attribute__((always_inline))

namespace sq {
namespace {

constexpr int64_t kLanes = 16;

// Adds up term(i) for i < k.
template <class Term>
SQ_ROWS_INLINE float lane_sum(int64_t k, const Term& term) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += term(i + lane);
  }
  for (int64_t lane = 0; i + lane < k; ++lane) lanes[lane] += term(i + lane);
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

template <class T, class Y>
SQ_ROWS_INLINE void norm_rows(const NormArgs& args, Range rows) {
  const int64_t k = args.k;
  const float count = static_cast<float>(k);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * k;
    if (args.residual != nullptr) {
      const T* residual = static_cast<const T*>(args.residual) + row * k;
      T* sum = static_cast<T*>(args.sum) + row * k;
      for (int64_t i = 0; i < k; ++i) from_float(to_float(x[i]) + to_float(residual[i]), sum + i);
      x = sum;
    }
    float mean = 0.0f;
    if (args.norm == Norm::kLayer) {
      mean = lane_sum(k, [&](int64_t i) __attribute__((always_inline)) { return to_float(x[i]); }) / count;
    }
    const float squares = lane_sum(k, [&](int64_t i) __attribute__((always_inline)) {
      const float value = to_float(x[i]) - mean;
      return value * value;
    });
    const float gain = 1.0f / std::sqrt(squares / count + args.eps);
    Y* y = static_cast<Y*>(args.y) + (row - rows.begin) * k;
    if (args.bias == nullptr) {
      for (int64_t i = 0; i < k; ++i) from_float((to_float(x[i]) - mean) * gain * args.weight[i], y + i);
    } else {
      for (int64_t i = 0; i < k; ++i) from_float((to_float(x[i]) - mean) * gain * args.weight[i] + args.bias[i], y + i);
    }
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

// Half the complementary error function of z >= 0, which is the normal distribution's tail beyond sqrt(2) z. Chebyshev
// fit of Numerical Recipes (Press et al., section 6.2, erfcc): relative error under 1.2e-7, and what fp32 adds for z^2.
SQ_ROWS_INLINE float normal_tail(float z) {
  const float t = 1.0f / (1.0f + 0.5f * z);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  return 0.5f * t * exp_polynomial(p - z * z);
}

template <Activation kActivation>
SQ_ROWS_INLINE float activate(float x) {
  if constexpr (kActivation == Activation::kSilu) {
    return x / (1.0f + exp_polynomial(-x));
  } else if constexpr (kActivation == Activation::kGelu) {
    const float tail = normal_tail(std::fabs(x) * 0.70710678118654752f);
    return x * (x < 0.0f ? tail : 1.0f - tail);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    return x / (1.0f + exp_polynomial(x * -1.5957691216057308f * (1.0f + 0.044715f * (x * x))));
  } else {
    return x < 0.0f ? 0.0f : x;
  }
}

template <Activation kActivation, class T>
SQ_ROWS_INLINE void activate_rows(const ActivateArgs& args, Range rows) {
  const int64_t begin = rows.begin * args.k, count = (rows.end - rows.begin) * args.k;
  const T* gate = static_cast<const T*>(args.gate) + begin;
  float* __restrict v = args.v;
  if (args.up == nullptr) {
    for (int64_t i = 0; i < count; ++i) v[i] = activate<kActivation>(to_float(gate[i]));
  } else {
    const T* up = static_cast<const T*>(args.up) + begin;
    for (int64_t i = 0; i < count; ++i) v[i] = activate<kActivation>(to_float(gate[i])) * to_float(up[i]);
  }
}

template <Activation kActivation>
SQ_ROWS_INLINE void activate_rows(const ActivateArgs& args, Range rows) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return activate_rows<kActivation, BFloat16>(args, rows);
    case DType::kFloat16:
      return activate_rows<kActivation, Float16>(args, rows);
    default:
      return activate_rows<kActivation, float>(args, rows);
  }
}

template <class T>
SQ_ROWS_INLINE void norm_rows(const NormArgs& args, Range rows) {
  args.y_dtype == args.x_dtype ? norm_rows<T, T>(args, rows) : norm_rows<T, float>(args, rows);
}

}  // namespace

SQ_ROWS_TARGET void SQ_ROWS(norm_rows)(const NormArgs& args, Range rows) {
  switch (args.x_dtype) {
    case DType::kBFloat16:
      return norm_rows<BFloat16>(args, rows);
    case DType::kFloat16:
      return norm_rows<Float16>(args, rows);
    default:
      return norm_rows<float, float>(args, rows);
  }
}

SQ_ROWS_TARGET void SQ_ROWS(activate_rows)(const ActivateArgs& args, Range rows) {
  switch (args.activation) {
    case Activation::kSilu:
      return activate_rows<Activation::kSilu>(args, rows);
    case Activation::kGelu:
      return activate_rows<Activation::kGelu>(args, rows);
    case Activation::kGeluTanh:
      return activate_rows<Activation::kGeluTanh>(args, rows);
    case Activation::kRelu:
      return activate_rows<Activation::kRelu>(args, rows);
  }
}

}  // namespace sq
