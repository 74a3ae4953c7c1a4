// Attention with AVX2 and FMA, eight floats at a time.
#if defined(__x86_64__)
#include <immintrin.h>

#define SQ_ATTENTION_TARGET __attribute__((target("avx2,fma,f16c")))
#include "cpu/kernels/attention_body.h"

namespace sq {
namespace {

struct Avx2 {
  using Vec = float __attribute__((vector_size(32)));
  using Operand = float;
  using Factor = Vec;
  static constexpr int kLanes = 8, kPair = 1, kRows = 6, kVecs = 2, kDepth = kLanes, kHeight = 1, kKeys = 128,
                       kStripe = 48;

  SQ_ATTENTION_INLINE static Vec load(const float* operands) { return _mm256_loadu_ps(operands); }
  SQ_ATTENTION_INLINE static Vec broadcast(const float* operand) { return _mm256_broadcast_ss(operand); }
  SQ_ATTENTION_INLINE static Vec multiply_add(Vec a, Vec b, Vec sum) { return _mm256_fmadd_ps(a, b, sum); }
  SQ_ATTENTION_INLINE static Vec exp2(Vec t) { return exp2_by_bits<Avx2>(t); }
  SQ_ATTENTION_INLINE static void store(Vec value, float* target) { _mm256_storeu_ps(target, value); }
  // Lane k of a half with lane k + 2, then with lane k + 1; then the halves.
  SQ_ATTENTION_INLINE static __m128 add_halves(Vec value) {
    return _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  }
  SQ_ATTENTION_INLINE static float sum(Vec value) {
    const Vec two = value + Vec(_mm256_permute_ps(value, 0x4E));
    return _mm_cvtss_f32(add_halves(two + Vec(_mm256_permute_ps(two, 0xB1))));
  }
  SQ_ATTENTION_INLINE static float most(Vec value) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    const __m128 two = _mm_max_ps(four, _mm_permute_ps(four, 0x4E));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_permute_ps(two, 0xB1)));
  }
  SQ_ATTENTION_INLINE static void sums(const Vec* four, float* target) {
    const Vec low = Vec(_mm256_unpacklo_ps(four[0], four[1])) + Vec(_mm256_unpackhi_ps(four[0], four[1]));
    const Vec high = Vec(_mm256_unpacklo_ps(four[2], four[3])) + Vec(_mm256_unpackhi_ps(four[2], four[3]));
    const Vec all = Vec(_mm256_shuffle_ps(low, high, 0x44)) + Vec(_mm256_shuffle_ps(low, high, 0xEE));
    _mm_storeu_ps(target, add_halves(all));
  }
  SQ_ATTENTION_INLINE static void transpose(const void* words, int64_t stride, int64_t count, void* target,
                                            int64_t target_stride) {
    transpose_words<8>(words, stride, count, target, target_stride);
  }
  SQ_ATTENTION_INLINE static Vec widen(const float* source) { return _mm256_loadu_ps(source); }
  SQ_ATTENTION_INLINE static Vec widen(const BFloat16* source) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  SQ_ATTENTION_INLINE static Vec widen(const Float16* source) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
  }
  SQ_ATTENTION_INLINE static Vec widen(const int8_t* source) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source))));
  }
};

SQ_ATTENTION_TARGET void attend_avx2(const AttentionArgs& args, const AttentionTask& task) {
  attend_in_dtype<Avx2, Avx2>(args, task);
}

}  // namespace

constexpr AttentionKernels kAttentionAvx2 = {"avx2", attend_avx2};

}  // namespace sq

#endif
