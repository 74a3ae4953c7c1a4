// The bodies of rows.h in plain C++, for the compiler to vectorize: rows_portable.cpp and others compile them for
// their instruction set: SQ_ROWS names its functions, SQ_ROWS_TARGET is their attribute, SQ_ROWS_LANES the floats of a
// register.
#include <cmath>
#include <cstring>
#include <type_traits>

#include "rows.h"

#define SQ_ROWS_INLINE inline __attribute__((always_inline)) SQ_ROWS_TARGET

namespace sq {
namespace {

constexpr int64_t kLanes = 16;

// Some of the lanes, as many as a register holds: loops over an array of floats are unrolled before they are vectorized.
constexpr int64_t kPartLanes = SQ_ROWS_LANES, kParts = kLanes / kPartLanes;
typedef float Part __attribute__((vector_size(kPartLanes * sizeof(float))));

template <class T>
SQ_ROWS_INLINE Part load_part(const T* x) {
  Part part;
  if constexpr (std::is_same_v<T, BFloat16>) {
    typedef uint16_t Halves __attribute__((vector_size(kPartLanes * sizeof(uint16_t))));
    typedef uint32_t Words __attribute__((vector_size(kPartLanes * sizeof(uint32_t))));
    Halves halves;
    std::memcpy(&halves, x, sizeof halves);
    const Words words = __builtin_convertvector(halves, Words) << 16;
    std::memcpy(&part, &words, sizeof part);
  } else if constexpr (std::is_same_v<T, float>) {
    std::memcpy(&part, x, sizeof part);
  } else {
    float values[kPartLanes];
    for (int64_t lane = 0; lane < kPartLanes; ++lane) values[lane] = to_float(x[lane]);
    std::memcpy(&part, values, sizeof part);
  }
  return part;
}

// The sum of x - mean, or of its squares.
template <bool kSquares, class T>
SQ_ROWS_INLINE float lane_sum(const T* x, float mean, int64_t k) {
  Part sums[kParts] = {};
  int64_t i = 0;
  for (; i + kLanes <= k; i += kLanes) {
#pragma GCC unroll 4
    for (int64_t part = 0; part < kParts; ++part) {
      const Part values = load_part(x + i + part * kPartLanes) - mean;
      sums[part] += kSquares ? values * values : values;
    }
  }
  float lanes[kLanes];
  std::memcpy(lanes, sums, sizeof lanes);
  for (int64_t lane = 0; i + lane < k; ++lane) {
    const float value = to_float(x[i + lane]) - mean;
    lanes[lane] += kSquares ? value * value : value;
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// target may be nothing else's memory; without that, the compiler would not vectorize.
template <class T>
SQ_ROWS_INLINE void add_row(const T* x, const T* residual, int64_t k, T* __restrict target) {
  for (int64_t i = 0; i < k; ++i) from_float(to_float(x[i]) + to_float(residual[i]), target + i);
}

template <class T, class Y>
SQ_ROWS_INLINE void scale_row(const T* x, float mean, float gain, const float* weight, const float* bias, int64_t k,
                              Y* __restrict y) {
  if (bias == nullptr) {
    for (int64_t i = 0; i < k; ++i) from_float((to_float(x[i]) - mean) * gain * weight[i], y + i);
  } else {
    for (int64_t i = 0; i < k; ++i) from_float((to_float(x[i]) - mean) * gain * weight[i] + bias[i], y + i);
  }
}

template <class T, class Y>
SQ_ROWS_INLINE void norm_rows(const NormArgs& args, Range rows) {
  const int64_t k = args.k;
  const float count = static_cast<float>(k);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * k;
    if (args.residual != nullptr) {
      T* sum = static_cast<T*>(args.sum) + row * k;
      add_row(x, static_cast<const T*>(args.residual) + row * k, k, sum);
      x = sum;
    }
    const float mean = args.norm == Norm::kLayer ? lane_sum<false>(x, 0.0f, k) / count : 0.0f;
    const float squares = lane_sum<true>(x, mean, k);
    const float gain = 1.0f / std::sqrt(squares / count + args.eps);
    scale_row(x, mean, gain, args.weight, args.bias, k, static_cast<Y*>(args.y) + (row - rows.begin) * k);
  }
}

// Cephes' expf: x = n ln 2 + r, e^x = 2^n e^r, with ln 2 in two parts and a polynomial for |r| <= ln 2 / 2. The error is
// under 2 ulp for -87 <= x <= 60, where it saturates: below, 2^n would not be a normal number; above, it would, but gcc 12
// divides by the constant that a limit leads to for every element, and subnormal quotients take four times as long. A NaN
// stays.
SQ_ROWS_INLINE float exp_polynomial(float x) {
  x = x > 60.0f ? 60.0f : x;
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

template <class T>
SQ_ROWS_INLINE float rounded(float value) {
  T target;
  from_float(value, &target);
  return to_float(target);
}

template <class T>
SQ_ROWS_INLINE void rotate_head(const T* x, const T* cos, const T* sin, int64_t d, T* __restrict y) {
  const int64_t half = d / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float product = rounded<T>(to_float(x[i]) * to_float(cos[i]));
    from_float(product + rounded<T>(-to_float(x[i + half]) * to_float(sin[i])), y + i);
  }
  for (int64_t i = half; i < d; ++i) {
    const float product = rounded<T>(to_float(x[i]) * to_float(cos[i]));
    from_float(product + rounded<T>(to_float(x[i - half]) * to_float(sin[i])), y + i);
  }
}

template <class T>
SQ_ROWS_INLINE void rotate_rows(const RotateArgs& args, Range rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t batch = row / args.time, time = row % args.time;
    const int64_t angle = batch * args.angle_batch + time * args.d;
    const T* x = static_cast<const T*>(args.x) + row * args.heads * args.d;
    T* y = static_cast<T*>(args.y) + batch * args.y_batch + time * args.y_time;
    for (int64_t head = 0; head < args.heads; ++head) {
      rotate_head(x + head * args.d, static_cast<const T*>(args.cos) + angle, static_cast<const T*>(args.sin) + angle,
                  args.d, y + head * args.y_head);
    }
  }
}

template <class T>
SQ_ROWS_INLINE void add_rows(const AddArgs& args, Range rows) {
  const int64_t begin = rows.begin * args.k, count = (rows.end - rows.begin) * args.k;
  add_row(static_cast<const T*>(args.x) + begin, static_cast<const T*>(args.residual) + begin, count,
          static_cast<T*>(args.y) + begin);
}

}  // namespace

SQ_ROWS_TARGET void SQ_ROWS(rotate_rows)(const RotateArgs& args, Range rows) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return rotate_rows<BFloat16>(args, rows);
    case DType::kFloat16:
      return rotate_rows<Float16>(args, rows);
    default:
      return rotate_rows<float>(args, rows);
  }
}

SQ_ROWS_TARGET void SQ_ROWS(add_rows)(const AddArgs& args, Range rows) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return add_rows<BFloat16>(args, rows);
    case DType::kFloat16:
      return add_rows<Float16>(args, rows);
    default:
      return add_rows<float>(args, rows);
  }
}

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
