// What the AVX-512 kernels share. Functions are compiled for their instruction set one by one, by attribute: a file-wide
// flag would also compile inline functions of the standard library for it, and the linker might pick those for everyone.
#pragma once

#if defined(__x86_64__)
#define SQ_X86 1
// gcc 12 takes the deliberately undefined operands in this header for mistakes.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include "cpu/kernels/gemm.h"

#define SQ_AVX512_FEATURES "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"
#define SQ_AVX512 __attribute__((target(SQ_AVX512_FEATURES)))
#define SQ_AVX512_INLINE inline __attribute__((always_inline, target(SQ_AVX512_FEATURES)))

namespace sq {

// The lowest `count` of 16, 32 or 64 lanes; all for more, none for less than one.
inline uint64_t lane_mask(int64_t count, int64_t lanes) {
  const int64_t kept = count < 0 ? 0 : count < lanes ? count : lanes;
  return kept == 64 ? ~0ull : (1ull << kept) - 1;
}

SQ_AVX512_INLINE __m512 widen_bf16(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// 16 elements of type kType from `source` on; lanes that are off read as 0.
template <DType kType>
SQ_AVX512_INLINE __m512 load_floats(const void* source, int64_t index, __mmask16 mask) {
  if constexpr (kType == DType::kFloat32) {
    return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(source) + index);
  } else {
    const __m256i bits = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(source) + index);
    return kType == DType::kBFloat16 ? widen_bf16(bits) : _mm512_cvtph_ps(bits);
  }
}

// fp32 to bf16 in the low halves of the lanes, to nearest even. Not vcvtneps2bf16, which flushes subnormals to zero.
SQ_AVX512_INLINE __m512i round_bf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7FC0));
}

// Writes 32 values as type kType.
template <DType kType>
SQ_AVX512_INLINE void store_floats(void* target, __mmask32 mask, __m512 low, __m512 high) {
  if constexpr (kType == DType::kFloat32) {
    _mm512_mask_storeu_ps(target, static_cast<__mmask16>(mask), low);
    _mm512_mask_storeu_ps(static_cast<float*>(target) + 16, static_cast<__mmask16>(mask >> 16), high);
  } else if constexpr (kType == DType::kBFloat16) {
    // The pack works within 128-bit lanes; the permutation puts its 64-bit pieces in order.
    const __m512i packed = _mm512_packus_epi32(round_bf16(low), round_bf16(high));
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    _mm512_mask_storeu_epi16(target, mask, _mm512_permutexvar_epi64(order, packed));
  } else {
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const __m512i halves = _mm512_castsi256_si512(_mm512_cvtps_ph(low, kNearest));
    _mm512_mask_storeu_epi16(target, mask, _mm512_inserti64x4(halves, _mm512_cvtps_ph(high, kNearest), 1));
  }
}

// What the last step needs of the 64 columns of a panel.
struct PanelColumns {
  alignas(64) float scale[kPanel];
  alignas(64) float bias[kPanel];
  alignas(64) int32_t start[kPanel];  // -128 * column sum, where the sums of u8 x s8 products begin
  int64_t first;                      // its first column in y
  int64_t count;                      // columns that exist
  uint64_t mask;                      // the same, a bit a column
  float smallest;                     // scale; 0 if a bias is so small that sums with it may be subnormal
};

SQ_AVX512_INLINE __m512 load_floats(const void* source, DType dtype, int64_t index, __mmask16 mask) {
  switch (dtype) {
    case DType::kBFloat16:
      return load_floats<DType::kBFloat16>(source, index, mask);
    case DType::kFloat16:
      return load_floats<DType::kFloat16>(source, index, mask);
    default:
      return load_floats<DType::kFloat32>(source, index, mask);
  }
}

SQ_AVX512_INLINE void load_columns(const GemmArgs& args, int64_t panel, PanelColumns* columns) {
  const int64_t first = panel * kPanel;
  columns->first = first;
  columns->count = args.n - first < kPanel ? args.n - first : kPanel;
  columns->mask = lane_mask(columns->count, kPanel);
  __m512 smallest = _mm512_set1_ps(1.0f);
  const auto* sums = reinterpret_cast<const int32_t*>(args.b + (panel + 1) * panel_bytes(args.k) - 4 * kPanel);
  for (int64_t i = 0; i < kPanel; i += 16) {
    const auto mask = static_cast<__mmask16>(lane_mask(columns->count - i, 16));
    const __m512 scale =
        args.b_scale_step == 0 ? _mm512_set1_ps(*args.b_scale) : _mm512_maskz_loadu_ps(mask, args.b_scale + first + i);
    _mm512_store_ps(columns->scale + i, scale);
    smallest = _mm512_mask_min_ps(smallest, mask, smallest, scale);
    if (args.bias != nullptr) {
      const __m512 bias = load_floats(args.bias, args.bias_dtype, first + i, mask);
      const __mmask16 is_small = _mm512_cmp_ps_mask(_mm512_abs_ps(bias), _mm512_set1_ps(0x1p-100f), _CMP_LT_OQ) &
                                 _mm512_cmp_ps_mask(bias, _mm512_setzero_ps(), _CMP_NEQ_OQ);
      smallest = _mm512_mask_mov_ps(smallest, is_small, _mm512_setzero_ps());
      _mm512_store_ps(columns->bias + i, bias);
    }
    const __m512i sum = _mm512_loadu_si512(sums + i);
    _mm512_store_si512(columns->start + i, _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sum, 7)));
  }
  columns->smallest = _mm512_reduce_min_ps(smallest);
}

SQ_AVX512_INLINE __m512 load_sums(const int32_t* sums) { return _mm512_cvtepi32_ps(_mm512_load_si512(sums)); }
SQ_AVX512_INLINE __m512 load_sums(const float* sums) { return _mm512_load_ps(sums); }

// sum * (a_scale * b_scale) + bias of 16 columns, every step one fp32 rounding.
template <bool kBias, class Sum>
SQ_AVX512_INLINE __m512 scale_sums(const Sum* sums, float a_scale, const float* b_scale, const float* bias) {
  const __m512 scale = _mm512_mul_ps(_mm512_set1_ps(a_scale), _mm512_load_ps(b_scale));
  const __m512 value = _mm512_mul_ps(load_sums(sums), scale);
  return kBias ? _mm512_add_ps(value, _mm512_load_ps(bias)) : value;
}

// Finishes the 32 columns of a row that begin `offset` columns into the panel.
template <DType kOut, bool kBias, class Sum>
SQ_AVX512_INLINE void store_sums(const Sum* sums, float a_scale, const PanelColumns& columns, int64_t offset, void* y) {
  const float *scale = columns.scale + offset, *bias = columns.bias + offset;
  const __m512 low = scale_sums<kBias>(sums, a_scale, scale, bias);
  const __m512 high = scale_sums<kBias>(sums + 16, a_scale, scale + 16, bias + 16);
  store_floats<kOut>(y, static_cast<__mmask32>(columns.mask >> offset), low, high);
}

template <DType kOut>
inline uint8_t* output_address(const GemmArgs& args, int64_t row, int64_t column) {
  return static_cast<uint8_t*>(args.y) + (row * args.n + column) * (kOut == DType::kFloat32 ? 4 : 2);
}

// Finishes rows of a panel, whose sums are kPanel apart.
template <DType kOut, bool kBias, class Sum>
SQ_AVX512_INLINE void store_panel(const GemmArgs& args, const PanelColumns& columns, int64_t row, int64_t count,
                                  const Sum* sums) {
  constexpr int64_t kHalf = kPanel / 2;
  for (int64_t r = 0; r < count; ++r, sums += kPanel) {
    const float a_scale = args.a_scale[(row + r) * args.a_scale_step];
    uint8_t* y = output_address<kOut>(args, row + r, columns.first);
    store_sums<kOut, kBias>(sums, a_scale, columns, 0, y);
    if (columns.count > kHalf) {
      store_sums<kOut, kBias>(sums + kHalf, a_scale, columns, kHalf, y + kHalf * (kOut == DType::kFloat32 ? 4 : 2));
    }
  }
}

// Calls kernel<output type, has bias>(args, ...) for the types in args.
#define SQ_DISPATCH_OUTPUT(kernel, args, ...)                                  \
  do {                                                                         \
    const bool has_bias_ = (args).bias != nullptr;                             \
    switch ((args).y_dtype) {                                                  \
      case DType::kBFloat16:                                                   \
        return has_bias_ ? kernel<DType::kBFloat16, true>(args, __VA_ARGS__)   \
                         : kernel<DType::kBFloat16, false>(args, __VA_ARGS__); \
      case DType::kFloat16:                                                    \
        return has_bias_ ? kernel<DType::kFloat16, true>(args, __VA_ARGS__)    \
                         : kernel<DType::kFloat16, false>(args, __VA_ARGS__);  \
      default:                                                                 \
        return has_bias_ ? kernel<DType::kFloat32, true>(args, __VA_ARGS__)    \
                         : kernel<DType::kFloat32, false>(args, __VA_ARGS__);  \
    }                                                                          \
  } while (false)

}  // namespace sq

#else
#define SQ_X86 0
#endif
