// The quantizers with AVX2, 32 elements a step; the last step of a row ends with it, and does again what it shares with the
// one before. Bytes moved a row: the input once from memory and once from cache.
#include "cpu/kernels/avx2.h"
#include "cpu/kernels/quantize.h"

#if SQ_X86

namespace sq {
namespace {

constexpr int64_t kStep = 32;

// The step after the one at k of a row of `total`.
inline int64_t next_step(int64_t k, int64_t total) {
  return k + kStep == total || k + 2 * kStep <= total ? k + kStep : total - kStep;
}

// What a row of the input consists of.
template <DType kIn, bool kSmooth>
struct Row {
  static constexpr int64_t kSize = kIn == DType::kFloat32 ? 4 : 2;
  const uint8_t* x;
  const float* smooth;
  int64_t k;

  Row(const QuantizeArgs& args, int64_t row)
      : x(static_cast<const uint8_t*>(args.x) + row * args.k * kSize), smooth(args.smooth), k(args.k) {}

  SQ_AVX2_INLINE __m256i load_bits(int64_t i) const {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i * kSize));
  }
  // v = x, or x / smooth, of 8 elements
  SQ_AVX2_INLINE __m256 load_values(int64_t i) const {
    __m256 value;
    if constexpr (kIn == DType::kFloat32) {
      value = _mm256_castsi256_ps(load_bits(i));
    } else {
      const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i * kSize));
      value = kIn == DType::kBFloat16 ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))
                                      : _mm256_cvtph_ps(bits);
    }
    return kSmooth ? _mm256_div_ps(value, _mm256_loadu_ps(smooth + i)) : value;
  }
};

SQ_AVX2_INLINE uint32_t largest_of(__m256i values) {
  const __m128i four = _mm_max_epu32(_mm256_castsi256_si128(values), _mm256_extracti128_si256(values, 1));
  const __m128i two = _mm_max_epu32(four, _mm_unpackhi_epi64(four, four));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epu32(two, _mm_srli_epi64(two, 32))));
}

// The bits of the row's largest magnitude: as integers they order like magnitudes, and every NaN is above infinity.
template <DType kIn, bool kSmooth>
SQ_AVX2_INLINE uint32_t absmax_bits(const Row<kIn, kSmooth>& row) {
  __m256i largest[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
  if constexpr (kIn != DType::kFloat32 && !kSmooth) {
    const __m256i magnitude = _mm256_set1_epi16(0x7FFF);
    for (int64_t k = 0; k < row.k; k = next_step(k, row.k)) {
      largest[0] = _mm256_max_epu16(largest[0], _mm256_and_si256(magnitude, row.load_bits(k)));
      largest[1] = _mm256_max_epu16(largest[1], _mm256_and_si256(magnitude, row.load_bits(k + 16)));
    }
    const __m256i both = _mm256_max_epu16(largest[0], largest[1]);
    const auto bits = static_cast<uint16_t>(
        largest_of(_mm256_max_epu32(_mm256_and_si256(both, _mm256_set1_epi32(0xFFFF)), _mm256_srli_epi32(both, 16))));
    return kIn == DType::kBFloat16 ? static_cast<uint32_t>(bits) << 16 : float_bits(to_float(Float16{bits}));
  } else {
    const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
    for (int64_t k = 0; k < row.k; k = next_step(k, row.k)) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256i bits = _mm256_castps_si256(row.load_values(k + 8 * i));
        largest[i % 2] = _mm256_max_epu32(largest[i % 2], _mm256_and_si256(bits, magnitude));
      }
    }
    return largest_of(_mm256_max_epu32(largest[0], largest[1]));
  }
}

// Per token, |v * multiplier| <= qmax * (1 + 2^-22), which rounds to qmax, and no value is a NaN; only static values need
// the limits. Saturated to +-limit; a NaN stays, because min and max return their second operand then.
SQ_AVX2_INLINE __m256 clamp(__m256 value, float limit) {
  return _mm256_max_ps(_mm256_set1_ps(-limit), _mm256_min_ps(_mm256_set1_ps(limit), value));
}

template <DType kQ, bool kClamp>
SQ_AVX2_INLINE __m256i round_to(__m256 value) {
  if constexpr (kQ == DType::kInt8) {
    if constexpr (!kClamp) return _mm256_cvtps_epi32(value);
    return _mm256_cvtps_epi32(_mm256_and_ps(clamp(value, 127.0f), _mm256_cmp_ps(value, value, _CMP_ORD_Q)));
  } else {
    // As in dtypes.h: subnormals are rounded by an addition that moves their unit to the last bit of the sum.
    constexpr bool kE4M3 = kQ == DType::kFloat8E4M3;
    constexpr int kShift = kE4M3 ? 20 : 21;
    constexpr int32_t kBias = (kE4M3 ? 120 : 112) << 23, kSmallestNormal = kBias + (1 << 23);
    constexpr float kLineUp = kE4M3 ? 0x1p14f : 0x1p7f;
    const __m256i bits = _mm256_castps_si256(kClamp ? clamp(value, quantized_max(kQ)) : value);
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
    const __m256 line_up = _mm256_set1_ps(kLineUp);
    const __m256i subnormal = _mm256_sub_epi32(
        _mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(magnitude), line_up)), _mm256_castps_si256(line_up));
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(magnitude, kShift), _mm256_set1_epi32(1));
    const __m256i rounding = _mm256_set1_epi32((1 << (kShift - 1)) - 1 - kBias);
    const __m256i normal = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(magnitude, rounding), odd), kShift);
    const __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(kSmallestNormal), magnitude);
    __m256i result = _mm256_blendv_epi8(normal, subnormal, is_small);
    if constexpr (kClamp) {
      const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
      result = _mm256_blendv_epi8(result, _mm256_set1_epi32(0x7F), is_nan);
    }
    return _mm256_or_si256(result, _mm256_and_si256(_mm256_srli_epi32(bits, 24), _mm256_set1_epi32(0x80)));
  }
}

template <DType kQ, bool kClamp, DType kIn, bool kSmooth>
SQ_AVX2 void convert_row(const Row<kIn, kSmooth> row, float multiplier, uint8_t flip, uint8_t* q) {
  const __m256 factor = _mm256_set1_ps(multiplier);
  const __m256i flips = _mm256_set1_epi8(static_cast<char>(flip));
  // The packs work within 128-bit lanes, which leaves the 4-byte pieces of 4 vectors interleaved.
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t k = 0; k < row.k; k = next_step(k, row.k)) {
    __m256i lanes[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) lanes[i] = round_to<kQ, kClamp>(_mm256_mul_ps(row.load_values(k + 8 * i), factor));
    const __m256i low = _mm256_packs_epi32(lanes[0], lanes[1]), high = _mm256_packs_epi32(lanes[2], lanes[3]);
    const __m256i bytes = kQ == DType::kInt8 ? _mm256_packs_epi16(low, high) : _mm256_packus_epi16(low, high);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + k),
                        _mm256_xor_si256(_mm256_permutevar8x32_epi32(bytes, order), flips));
  }
}

template <bool kClamp, DType kIn, bool kSmooth>
void convert_row(const QuantizeArgs& args, const Row<kIn, kSmooth>& row, float multiplier, uint8_t* q) {
  switch (args.q_dtype) {
    case DType::kFloat8E4M3:
      return convert_row<DType::kFloat8E4M3, kClamp>(row, multiplier, args.flip, q);
    case DType::kFloat8E5M2:
      return convert_row<DType::kFloat8E5M2, kClamp>(row, multiplier, args.flip, q);
    default:
      return convert_row<DType::kInt8, kClamp>(row, multiplier, args.flip, q);
  }
}

template <DType kIn, bool kSmooth>
SQ_AVX2 void quantize_rows(const QuantizeArgs& args, Range rows) {
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const Row<kIn, kSmooth> row(args, i);
    uint8_t* q = args.q + i * args.q_stride;
    const RowScale scale = row_scale(args, args.scale == nullptr ? 0 : absmax_bits(row));
    if (args.scale != nullptr) args.scale[i] = scale.scale;
    if (scale.multiplier == 0.0f) {
      __builtin_memset(q, args.flip, args.k);
    } else if (args.static_scale != 0.0f) {
      convert_row<true>(args, row, scale.multiplier, q);
    } else {
      convert_row<false>(args, row, scale.multiplier, q);
    }
  }
}

template <DType kIn>
void quantize_rows(const QuantizeArgs& args, Range rows) {
  args.smooth == nullptr ? quantize_rows<kIn, false>(args, rows) : quantize_rows<kIn, true>(args, rows);
}

void quantize_rows_avx2(const QuantizeArgs& args, Range rows) {
  if (args.k < kStep) return kQuantizePortable.run(args, rows);
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

constexpr QuantizeKernels kQuantizeAvx2 = {"avx2", quantize_rows_avx2};

}  // namespace sq

#endif
