// The quantizers with AVX-512, 64 elements a step. Bytes moved a row: the input once from memory and once from cache.
#include "cpu/kernels/avx512.h"
#include "cpu/kernels/quantize.h"

#if SQ_X86

namespace sq {
namespace {

// v = x, or x / smooth, of 16 elements; lanes that are off give 0.
template <DType kIn, bool kSmooth>
SQ_AVX512_INLINE __m512 load_values(const QuantizeArgs& args, int64_t row, int64_t k, __mmask16 mask) {
  const __m512 x = load_floats<kIn>(args.x, row * args.k + k, mask);
  if constexpr (!kSmooth) return x;
  return _mm512_maskz_div_ps(mask, x, _mm512_maskz_loadu_ps(mask, args.smooth + k));
}

// The bits of the row's largest magnitude: as integers they order like magnitudes, and every NaN is above infinity.
template <DType kIn, bool kSmooth>
SQ_AVX512_INLINE uint32_t absmax_bits(const QuantizeArgs& args, int64_t row) {
  if constexpr (kIn != DType::kFloat32 && !kSmooth) {
    const auto* x = static_cast<const uint16_t*>(args.x) + row * args.k;
    const __m512i magnitude = _mm512_set1_epi16(0x7FFF);
    __m512i largest[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
    int64_t k = 0;
    for (; k + 64 <= args.k; k += 64) {
      largest[0] = _mm512_max_epu16(largest[0], _mm512_and_si512(magnitude, _mm512_loadu_si512(x + k)));
      largest[1] = _mm512_max_epu16(largest[1], _mm512_and_si512(magnitude, _mm512_loadu_si512(x + k + 32)));
    }
    for (; k < args.k; k += 32) {
      const auto mask = static_cast<__mmask32>(lane_mask(args.k - k, 32));
      largest[0] = _mm512_max_epu16(largest[0], _mm512_and_si512(magnitude, _mm512_maskz_loadu_epi16(mask, x + k)));
    }
    const __m512i both = _mm512_max_epu16(largest[0], largest[1]);
    const __m512i words =
        _mm512_max_epu32(_mm512_and_si512(both, _mm512_set1_epi32(0xFFFF)), _mm512_srli_epi32(both, 16));
    const auto bits = static_cast<uint16_t>(_mm512_reduce_max_epu32(words));
    return kIn == DType::kBFloat16 ? static_cast<uint32_t>(bits) << 16 : float_bits(to_float(Float16{bits}));
  } else {
    const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
    __m512i largest = _mm512_setzero_si512();
    int64_t k = 0;
    for (; k + 16 <= args.k; k += 16) {
      const __m512i bits = _mm512_castps_si512(load_values<kIn, kSmooth>(args, row, k, 0xFFFF));
      largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, magnitude));
    }
    if (k < args.k) {
      const auto mask = static_cast<__mmask16>(lane_mask(args.k - k, 16));
      const __m512i bits = _mm512_castps_si512(load_values<kIn, kSmooth>(args, row, k, mask));
      largest = _mm512_max_epu32(largest, _mm512_and_si512(bits, magnitude));
    }
    return _mm512_reduce_max_epu32(largest);
  }
}

// Per token, |v * multiplier| <= qmax * (1 + 2^-22), which rounds to qmax; only static values need the limits.
// Saturated to +-limit; a NaN stays, because min and max return their second operand then.
SQ_AVX512_INLINE __m512 clamp(__m512 value, float limit) {
  return _mm512_max_ps(_mm512_set1_ps(-limit), _mm512_min_ps(_mm512_set1_ps(limit), value));
}

template <DType kQ, bool kClamp>
SQ_AVX512_INLINE __m512i round_to(__m512 value) {
  if constexpr (kQ == DType::kInt8) {
    if constexpr (!kClamp) return _mm512_cvtps_epi32(value);
    const __mmask16 number = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
    return _mm512_cvtps_epi32(_mm512_maskz_mov_ps(number, clamp(value, 127.0f)));
  } else {
    // As in dtypes.h: subnormals are rounded by an addition that moves their unit to the last bit of the sum.
    constexpr bool kE4M3 = kQ == DType::kFloat8E4M3;
    constexpr int kShift = kE4M3 ? 20 : 21;
    constexpr int32_t kBias = (kE4M3 ? 120 : 112) << 23, kSmallestNormal = kBias + (1 << 23);
    constexpr float kLineUp = kE4M3 ? 0x1p14f : 0x1p7f;
    const __m512 clamped = kClamp ? clamp(value, kE4M3 ? 448.0f : 57344.0f) : value;
    const __m512i bits = _mm512_castps_si512(clamped);
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
    const __m512 line_up = _mm512_set1_ps(kLineUp);
    const __m512i subnormal = _mm512_sub_epi32(
        _mm512_castps_si512(_mm512_add_ps(_mm512_castsi512_ps(magnitude), line_up)), _mm512_castps_si512(line_up));
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(magnitude, kShift), _mm512_set1_epi32(1));
    const __m512i rounding = _mm512_set1_epi32((1 << (kShift - 1)) - 1 - kBias);
    const __m512i normal = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(magnitude, rounding), odd), kShift);
    const __mmask16 is_small = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(kSmallestNormal));
    const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    __m512i result = _mm512_mask_mov_epi32(normal, is_small, subnormal);
    result = _mm512_mask_mov_epi32(result, is_nan, _mm512_set1_epi32(0x7F));
    return _mm512_or_si512(result, _mm512_and_si512(_mm512_srli_epi32(bits, 24), _mm512_set1_epi32(0x80)));
  }
}

// 64 elements from k on; the lanes of `mask` exist.
template <DType kIn, bool kSmooth, DType kQ, bool kClamp>
SQ_AVX512_INLINE void convert_64(const QuantizeArgs& args, int64_t row, int64_t k, uint64_t mask, __m512 multiplier,
                                 uint8_t* q) {
  __m512i lanes[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto part = static_cast<__mmask16>(mask >> (16 * i));
    lanes[i] = round_to<kQ, kClamp>(_mm512_mul_ps(load_values<kIn, kSmooth>(args, row, k + 16 * i, part), multiplier));
  }
  const __m512i low = _mm512_packs_epi32(lanes[0], lanes[1]), high = _mm512_packs_epi32(lanes[2], lanes[3]);
  const __m512i bytes = kQ == DType::kInt8 ? _mm512_packs_epi16(low, high) : _mm512_packus_epi16(low, high);
  // The packs work within 128-bit lanes, which leaves the 4-byte pieces of 4 vectors interleaved.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(args.flip));
  _mm512_mask_storeu_epi8(q + k, mask, _mm512_xor_si512(_mm512_permutexvar_epi32(order, bytes), flip));
}

template <DType kIn, bool kSmooth, DType kQ, bool kClamp>
SQ_AVX512 void convert_row(const QuantizeArgs& shared_args, int64_t row, float multiplier, uint8_t* q) {
  const QuantizeArgs args = shared_args;  // a copy, which a store to q cannot change
  const __m512 factor = _mm512_set1_ps(multiplier);
  int64_t k = 0;
  for (; k + 64 <= args.k; k += 64) convert_64<kIn, kSmooth, kQ, kClamp>(args, row, k, ~0ull, factor, q);
  if (k < args.k) convert_64<kIn, kSmooth, kQ, kClamp>(args, row, k, lane_mask(args.k - k, 64), factor, q);
}

template <DType kIn, bool kSmooth, DType kQ>
void convert_row(const QuantizeArgs& args, int64_t row, float multiplier, uint8_t* q) {
  if (args.static_scale != 0.0f) {
    convert_row<kIn, kSmooth, kQ, true>(args, row, multiplier, q);
  } else {
    convert_row<kIn, kSmooth, kQ, false>(args, row, multiplier, q);
  }
}

template <DType kIn, bool kSmooth>
void convert_row(const QuantizeArgs& args, int64_t row, float multiplier, uint8_t* q) {
  switch (args.q_dtype) {
    case DType::kFloat8E4M3:
      return convert_row<kIn, kSmooth, DType::kFloat8E4M3>(args, row, multiplier, q);
    case DType::kFloat8E5M2:
      return convert_row<kIn, kSmooth, DType::kFloat8E5M2>(args, row, multiplier, q);
    default:
      return convert_row<kIn, kSmooth, DType::kInt8>(args, row, multiplier, q);
  }
}

template <DType kIn, bool kSmooth>
SQ_AVX512 void quantize_rows(const QuantizeArgs& args, Range rows) {
  // The largest values of a few rows are looked for together: each ends in a chain of slow steps that the others hide.
  constexpr int64_t kGroup = 4;
  for (int64_t first = rows.begin; first < rows.end; first += kGroup) {
    const int64_t end = first + kGroup < rows.end ? first + kGroup : rows.end;
    RowScale scales[kGroup];
    for (int64_t row = first; row < end; ++row) {
      scales[row - first] = row_scale(args, args.scale == nullptr ? 0 : absmax_bits<kIn, kSmooth>(args, row));
      if (args.scale != nullptr) args.scale[row] = scales[row - first].scale;
    }
    for (int64_t row = first; row < end; ++row) {
      const float multiplier = scales[row - first].multiplier;
      uint8_t* q = args.q + row * args.q_stride;
      if (multiplier == 0.0f) {
        __builtin_memset(q, args.flip, args.k);
      } else {
        convert_row<kIn, kSmooth>(args, row, multiplier, q);
      }
    }
  }
}

template <DType kIn>
void quantize_rows(const QuantizeArgs& args, Range rows) {
  args.smooth == nullptr ? quantize_rows<kIn, false>(args, rows) : quantize_rows<kIn, true>(args, rows);
}

void quantize_rows_avx512(const QuantizeArgs& args, Range rows) {
  switch (args.x_dtype) {
    case DType::kBFloat16:
      return quantize_rows<DType::kBFloat16>(args, rows);
    case DType::kFloat16:
      return quantize_rows<DType::kFloat16>(args, rows);
    default:
      return quantize_rows<DType::kFloat32>(args, rows);
  }
}

}  // namespace

constexpr QuantizeKernels kQuantizeAvx512 = {"avx512", quantize_rows_avx512};

}  // namespace sq

#endif
