// The activations of MLPs in plain fp32 operations, for the CPU kernels and the CUDA ones: the same bits everywhere.
//   silu       x / (1 + exp(-x))
//   gelu       x * Phi(x), Phi from the complementary error function
//   gelu_tanh  x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3))), which is 0.5 x (1 + tanh(...))
//   relu       0 for x < 0, else x
#pragma once

#include "common/dtypes.h"

// Inlined always, so that each instruction set compiles it for itself.
#define SQ_MATH SQ_HOST_DEVICE inline __attribute__((always_inline))

namespace sq {

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu };

// Cephes' expf: x = n ln 2 + r, e^x = 2^n e^r, with ln 2 in two parts and a polynomial for |r| <= ln 2 / 2. The error is
// under 2 ulp for -87 <= x <= 60, where it saturates: below, 2^n would not be a normal number; above, it would, but gcc 12
// divides by the constant that a limit leads to for every element, and subnormal quotients take four times as long. A NaN
// stays.
SQ_MATH float exp_polynomial(float x) {
#ifdef __CUDA_ARCH__
  x = fmaxf(fminf(x, 60.0f),
            -87.0f);  // an instruction each; of a NaN some number, but all who ask multiply with x then
#else
  x = x > 60.0f ? 60.0f : x;
  x = x < -87.0f ? -87.0f : x;
#endif
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
SQ_MATH float normal_tail(float z) {
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
SQ_MATH float activate(float x) {
  if constexpr (kActivation == Activation::kSilu) {
    return x / (1.0f + exp_polynomial(-x));
  } else if constexpr (kActivation == Activation::kGelu) {
    const float tail = normal_tail(float_from_bits(float_bits(x) & ~kFloatSign) * 0.70710678118654752f);
    return x * (x < 0.0f ? tail : 1.0f - tail);
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    return x / (1.0f + exp_polynomial(x * -1.5957691216057308f * (1.0f + 0.044715f * (x * x))));
  } else {
    return x < 0.0f ? 0.0f : x;
  }
}

}  // namespace sq
