// FP8 product with AVX-512: the weight is decoded to fp32, 64 columns x 128 k at a time (32 KB, stays in L1 or L2), and
// multiplied by fp32 activations with fused multiply-adds. A micro kernel holds 6 rows x 64 columns, as in
// gemm_avx512vnni.cpp.
#include "cpu/kernels/avx512.h"

#if SQ_X86

namespace sq {
namespace {

constexpr int64_t kRows = 6;
constexpr int64_t kBlockRows = 252;  // rows whose sums wait for the next depth chunk: 63 KB
constexpr int64_t kDepth = 128;

// 16 fp8 values, one in the low byte of each lane.
template <DType kType>
SQ_AVX512_INLINE __m512 decode(__m512i bytes) {
  if constexpr (kType == DType::kFloat8E5M2) {
    return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_slli_epi32(bytes, 8)));  // the upper half of an fp16
  } else {
    const __m512i magnitude = _mm512_and_si512(bytes, _mm512_set1_epi32(0x7F));
    const __m512i normal = _mm512_add_epi32(_mm512_slli_epi32(magnitude, 20), _mm512_set1_epi32(120 << 23));
    const __m512 subnormal = _mm512_mul_ps(_mm512_cvtepi32_ps(magnitude), _mm512_set1_ps(0x1p-9f));
    const __mmask16 is_subnormal = _mm512_cmplt_epi32_mask(magnitude, _mm512_set1_epi32(8));
    const __mmask16 is_nan = _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(0x7F));
    __m512i bits = _mm512_mask_mov_epi32(normal, is_subnormal, _mm512_castps_si512(subnormal));
    bits = _mm512_mask_mov_epi32(bits, is_nan, _mm512_set1_epi32(0x7FC00000));
    const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(bytes, _mm512_set1_epi32(0x80)), 24);
    return _mm512_castsi512_ps(_mm512_or_si512(bits, sign));
  }
}

// `groups` times 4 k of a panel to fp32 [4 * groups][64].
template <DType kType>
SQ_AVX512 void decode_panel(const uint8_t* b, int64_t groups, float* decoded) {
  const __m512i low_byte = _mm512_set1_epi32(0xFF);
  for (int64_t part = 0; part < groups * 4; ++part) {
    const __m512i bytes = _mm512_loadu_si512(b + part * 64);  // 16 columns, 4 k each
    float* target = decoded + part / 4 * 4 * kPanel + part % 4 * 16;
    _mm512_store_ps(target, decode<kType>(_mm512_and_si512(bytes, low_byte)));
    _mm512_store_ps(target + kPanel, decode<kType>(_mm512_and_si512(_mm512_srli_epi32(bytes, 8), low_byte)));
    _mm512_store_ps(target + 2 * kPanel, decode<kType>(_mm512_and_si512(_mm512_srli_epi32(bytes, 16), low_byte)));
    _mm512_store_ps(target + 3 * kPanel, decode<kType>(_mm512_srli_epi32(bytes, 24)));
  }
}

// sums[r][0..64) += kCount rows of a times a decoded chunk of `depth` k.
template <int kCount>
SQ_AVX512 void micro_kernel(const uint8_t* a, int64_t a_stride, const float* b, int64_t depth, float* sums) {
#define SQ_FOR_ROWS(STEP) STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5)
#define SQ_LOAD_ROW(r)                                \
  __m512 s##r##0, s##r##1, s##r##2, s##r##3;          \
  if constexpr (r < kCount) {                         \
    s##r##0 = _mm512_load_ps(sums + r * kPanel);      \
    s##r##1 = _mm512_load_ps(sums + r * kPanel + 16); \
    s##r##2 = _mm512_load_ps(sums + r * kPanel + 32); \
    s##r##3 = _mm512_load_ps(sums + r * kPanel + 48); \
  }
#define SQ_MULTIPLY_ROW(r)                                                                    \
  if constexpr (r < kCount) {                                                                 \
    const __m512 value = _mm512_set1_ps(reinterpret_cast<const float*>(a + r * a_stride)[k]); \
    s##r##0 = _mm512_fmadd_ps(value, b0, s##r##0);                                            \
    s##r##1 = _mm512_fmadd_ps(value, b1, s##r##1);                                            \
    s##r##2 = _mm512_fmadd_ps(value, b2, s##r##2);                                            \
    s##r##3 = _mm512_fmadd_ps(value, b3, s##r##3);                                            \
  }
#define SQ_STORE_ROW(r)                               \
  if constexpr (r < kCount) {                         \
    _mm512_store_ps(sums + r * kPanel, s##r##0);      \
    _mm512_store_ps(sums + r * kPanel + 16, s##r##1); \
    _mm512_store_ps(sums + r * kPanel + 32, s##r##2); \
    _mm512_store_ps(sums + r * kPanel + 48, s##r##3); \
  }
  SQ_FOR_ROWS(SQ_LOAD_ROW)
  for (int64_t k = 0; k < depth; ++k) {
    const __m512 b0 = _mm512_load_ps(b), b1 = _mm512_load_ps(b + 16);
    const __m512 b2 = _mm512_load_ps(b + 32), b3 = _mm512_load_ps(b + 48);
    SQ_FOR_ROWS(SQ_MULTIPLY_ROW)
    b += kPanel;
  }
  SQ_FOR_ROWS(SQ_STORE_ROW)
#undef SQ_FOR_ROWS
#undef SQ_LOAD_ROW
#undef SQ_MULTIPLY_ROW
#undef SQ_STORE_ROW
}

using MicroKernel = void (*)(const uint8_t*, int64_t, const float*, int64_t, float*);
constexpr MicroKernel kMicroKernels[] = {nullptr,         micro_kernel<1>, micro_kernel<2>, micro_kernel<3>,
                                         micro_kernel<4>, micro_kernel<5>, micro_kernel<6>};

template <DType kOut, bool kBias>
SQ_AVX512 void gemm_panel(const GemmArgs& args, const PanelColumns& columns, Range rows) {
  alignas(64) float sums[kBlockRows * kPanel];
  alignas(64) float decoded[kDepth * kPanel];
  const uint8_t* b = args.b + columns.first / kPanel * panel_bytes(args.k);
  __builtin_memset(sums, 0, (rows.end - rows.begin) * kPanel * sizeof(float));
  for (int64_t k = 0; k < args.k; k += kDepth) {
    const int64_t depth = args.k - k < kDepth ? args.k - k : kDepth;
    const auto decode =
        args.b_dtype == DType::kFloat8E5M2 ? decode_panel<DType::kFloat8E5M2> : decode_panel<DType::kFloat8E4M3>;
    decode(b + k * kPanel, div_up(depth, 4), decoded);
    for (int64_t row = rows.begin; row < rows.end; row += kRows) {
      const int64_t count = rows.end - row < kRows ? rows.end - row : kRows;
      kMicroKernels[count](args.a + row * args.a_stride + 4 * k, args.a_stride, decoded, depth,
                           sums + (row - rows.begin) * kPanel);
    }
  }
  store_panel<kOut, kBias>(args, columns, rows.begin, rows.end - rows.begin, sums);
}

template <DType kOut, bool kBias>
SQ_AVX512 void gemm_range(const GemmArgs& args, Range rows, Range panels) {
  PanelColumns columns;
  for (int64_t row = rows.begin; row < rows.end; row += kBlockRows) {
    const int64_t end = row + kBlockRows < rows.end ? row + kBlockRows : rows.end;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      load_columns(args, panel, &columns);
      gemm_panel<kOut, kBias>(args, columns, {row, end});
    }
  }
}

void gemm_fp8_avx512(const GemmArgs& args, Range rows, Range panels) {
  SQ_DISPATCH_OUTPUT(gemm_range, args, rows, panels);
}

}  // namespace

constexpr GemmKernels kFp8Avx512 = {"avx512", gemm_fp8_avx512, /*block_bytes=*/1 << 21, widen_fp32_portable,
                                    /*element_size=*/4};

}  // namespace sq

#endif
