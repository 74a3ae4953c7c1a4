// FP8 values to bf16, which holds all of them, by byte permutations: what the kernels share that multiply FP8 in bf16.
#pragma once

#include "cpu/kernels/avx512.h"

#if SQ_X86

#define SQ_BF16_FEATURES SQ_AVX512_FEATURES ",avx512bf16,avx512vbmi"
#define SQ_BF16 __attribute__((target(SQ_BF16_FEATURES)))
#define SQ_BF16_INLINE inline __attribute__((always_inline, target(SQ_BF16_FEATURES)))

namespace sq {

// The bf16 bits of the 128 magnitudes of an fp8 type, in two halves for byte permutations.
struct alignas(64) Bf16Table {
  uint8_t low[128], high[128];

  explicit Bf16Table(float (*decode)(uint8_t)) {
    for (int i = 0; i < 128; ++i) {
      const uint32_t bits = float_bits(decode(static_cast<uint8_t>(i))) >> 16;
      low[i] = static_cast<uint8_t>(bits);
      high[i] = static_cast<uint8_t>(bits >> 8);
    }
  }
};

inline const Bf16Table& bf16_table(DType dtype) {
  static const Bf16Table e4m3(float8_e4m3_to_float);
  static const Bf16Table e5m2(float8_e5m2_to_float);
  return dtype == DType::kFloat8E5M2 ? e5m2 : e4m3;
}

// 64 fp8 values to the low and high bytes of their bf16. The permutation looks at the lowest 7 bits, and so not at signs.
SQ_BF16_INLINE void decode_bf16(const Bf16Table& table, __m512i bytes, __m512i* low, __m512i* high) {
  *low = _mm512_permutex2var_epi8(_mm512_load_si512(table.low), bytes, _mm512_load_si512(table.low + 64));
  const __m512i magnitude =
      _mm512_permutex2var_epi8(_mm512_load_si512(table.high), bytes, _mm512_load_si512(table.high + 64));
  *high = _mm512_or_si512(magnitude, _mm512_and_si512(bytes, _mm512_set1_epi8(static_cast<char>(0x80))));
}

// 16 columns of a weight in bf16: x the first 2 and x the last 2 of 4 k.
struct WeightPairs {
  __m512i first, second;
};

SQ_BF16_INLINE WeightPairs decode_weight_pairs(const Bf16Table& table, const uint8_t* b) {
  __m512i low, high;
  decode_bf16(table, _mm512_loadu_si512(b), &low, &high);
  const __m512 begin = _mm512_castsi512_ps(_mm512_unpacklo_epi8(low, high));
  const __m512 end = _mm512_castsi512_ps(_mm512_unpackhi_epi8(low, high));
  return {_mm512_castps_si512(_mm512_shuffle_ps(begin, end, _MM_SHUFFLE(2, 0, 2, 0))),
          _mm512_castps_si512(_mm512_shuffle_ps(begin, end, _MM_SHUFFLE(3, 1, 3, 1)))};
}

// The values of fp8 as bf16, exactly.
void widen_bf16_avx512(const WidenArgs& args, Range rows);

}  // namespace sq

#endif
