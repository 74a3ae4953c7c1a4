// Products of bf16 with vdpbf16ps for attention_avx512_bf16.cpp, and what its operands look like for attention_amx.cpp; each
// names its instruction set in SQ_ATTENTION_TARGET.
#pragma once

#include "cpu/kernels/attention_avx512.h"

namespace sq {
namespace {

struct Avx512Bf16 {
  using Vec = Avx512::Vec;
  using Operand = uint16_t;
  using Factor = __m512bh;
  static constexpr int kLanes = 16, kPair = 2, kRows = 6, kVecs = 4, kDepth = 16, kHeight = 1, kKeys = 128,
                       kStripe = 48;

  SQ_ATTENTION_INLINE static __m512bh load(const uint16_t* operands) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(operands));
  }
  SQ_ATTENTION_INLINE static __m512bh broadcast(const uint16_t* pair) {
    int32_t bits;
    __builtin_memcpy(&bits, pair, sizeof bits);
    return reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits));
  }
  SQ_ATTENTION_INLINE static void interleave(const uint16_t* even, const uint16_t* odd, uint16_t* target) {
    const __m512i low = _mm512_unpacklo_epi16(_mm512_loadu_si512(even), _mm512_loadu_si512(odd));
    const __m512i high = _mm512_unpackhi_epi16(_mm512_loadu_si512(even), _mm512_loadu_si512(odd));
    // The unpacks work within 128-bit lanes.
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    _mm512_storeu_si512(target, _mm512_permutex2var_epi64(low, first, high));
    _mm512_storeu_si512(target + 32, _mm512_permutex2var_epi64(low, second, high));
  }
  SQ_ATTENTION_INLINE static Vec multiply_add(__m512bh a, __m512bh b, Vec sum) { return _mm512_dpbf16_ps(sum, a, b); }
  SQ_ATTENTION_INLINE static void store(Vec value, uint16_t* target) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
  }
};

}  // namespace
}  // namespace sq
