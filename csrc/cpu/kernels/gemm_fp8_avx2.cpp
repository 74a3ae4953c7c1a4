// FP8 product with AVX2, FMA and F16C: the weight is decoded to fp32, 64 columns x 64 k at a time (16 KB, stays in L1), and
// multiplied by fp32 activations with fused multiply-adds. A micro kernel holds up to 6 rows x 16 columns: 12 accumulators.
#include "cpu/kernels/avx2.h"
#include "cpu/kernels/epilogue.h"

#if SQ_X86

namespace sq {
namespace {

constexpr int64_t kRows = 6;
constexpr int64_t kBlockRows = 252;  // rows whose sums wait for the next depth chunk: 63 KB
constexpr int64_t kDepth = 64;

// The two bytes of fp16 numbers: of e5m2 it is the upper one; of e4m3, 2^-8 times the value, but for its NaN.
template <DType kType>
SQ_AVX2_INLINE void split_halves(__m256i bytes, __m256i* low, __m256i* high) {
  if constexpr (kType == DType::kFloat8E5M2) {
    *low = _mm256_setzero_si256();
    *high = bytes;
  } else {
    const __m256i sign = _mm256_set1_epi8(static_cast<char>(0x80)), magnitude = _mm256_set1_epi8(0x7F);
    const __m256i is_nan = _mm256_cmpeq_epi8(_mm256_or_si256(bytes, sign), _mm256_set1_epi8(-1));
    *low = _mm256_and_si256(_mm256_slli_epi16(bytes, 7), sign);
    *high = _mm256_and_si256(_mm256_srli_epi16(_mm256_and_si256(bytes, magnitude), 1), magnitude);
    *high = _mm256_or_si256(*high, _mm256_or_si256(_mm256_and_si256(bytes, sign), is_nan));
  }
}

template <DType kType>
SQ_AVX2_INLINE void store_halves(__m128i halves, float* target) {
  const __m256 values = _mm256_cvtph_ps(halves);
  _mm256_store_ps(target, kType == DType::kFloat8E5M2 ? values : _mm256_mul_ps(values, _mm256_set1_ps(256.0f)));
}

// `groups` times 4 k of a panel to fp32 [4 * groups][64], while the next kDepth k are prefetched.
template <DType kType>
SQ_AVX2 void decode_panel(const uint8_t* b, int64_t groups, float* decoded) {
  // The 4 k of a column are neighbours: they change places with the 4 columns of a 128-bit lane, then with the lanes.
  const __m256i transpose =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t group = 0; group < groups; ++group, decoded += 4 * kPanel) {
    for (int64_t column = 0; column < kPanel; column += 8, b += 32) {
      _mm_prefetch(reinterpret_cast<const char*>(b + kDepth * kPanel), _MM_HINT_T0);
      const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
      __m256i low, high;
      split_halves<kType>(_mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(bytes, transpose), order), &low, &high);
      const __m256i even = _mm256_unpacklo_epi8(low, high), odd = _mm256_unpackhi_epi8(low, high);
      store_halves<kType>(_mm256_castsi256_si128(even), decoded + column);
      store_halves<kType>(_mm256_castsi256_si128(odd), decoded + kPanel + column);
      store_halves<kType>(_mm256_extracti128_si256(even, 1), decoded + 2 * kPanel + column);
      store_halves<kType>(_mm256_extracti128_si256(odd, 1), decoded + 3 * kPanel + column);
    }
  }
}

// sums[r][columns] += kCount rows of a times 8 * kVecs columns of a decoded chunk of `depth` k.
template <int kCount, int kVecs>
SQ_AVX2 void micro_kernel(const uint8_t* a, int64_t a_stride, const float* b, int64_t depth, float* sums) {
  __m256 acc[kCount][kVecs];
#pragma GCC unroll 6
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[r][v] = _mm256_load_ps(sums + r * kPanel + 8 * v);
  }
  for (int64_t k = 0; k < depth; ++k) {
    __m256 column[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) column[v] = _mm256_load_ps(b + 8 * v);
#pragma GCC unroll 6
    for (int r = 0; r < kCount; ++r) {
      const __m256 value = _mm256_broadcast_ss(reinterpret_cast<const float*>(a + r * a_stride));
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[r][v] = _mm256_fmadd_ps(value, column[v], acc[r][v]);
    }
    a += sizeof(float);
    b += kPanel;
  }
#pragma GCC unroll 6
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) _mm256_store_ps(sums + r * kPanel + 8 * v, acc[r][v]);
  }
}

// A tile of kCount rows times a decoded chunk, in slices of columns.
template <int kCount>
void tile_kernel(const uint8_t* a, int64_t a_stride, const float* b, int64_t depth, float* sums) {
  constexpr int kVecs = kCount == 1 ? 8 : kCount == 2 ? 4 : 2;  // few rows need more columns for enough sums
  for (int64_t column = 0; column < kPanel; column += 8 * kVecs) {
    micro_kernel<kCount, kVecs>(a, a_stride, b + column, depth, sums + column);
  }
}

using TileKernel = void (*)(const uint8_t*, int64_t, const float*, int64_t, float*);
constexpr TileKernel kTileKernels[] = {nullptr,        tile_kernel<1>, tile_kernel<2>, tile_kernel<3>,
                                       tile_kernel<4>, tile_kernel<5>, tile_kernel<6>};

SQ_AVX2 void gemm_panel(const GemmArgs& args, Range rows, int64_t panel) {
  alignas(64) float sums[kBlockRows * kPanel];
  alignas(64) float decoded[kDepth * kPanel];
  const auto decode =
      args.b_dtype == DType::kFloat8E5M2 ? decode_panel<DType::kFloat8E5M2> : decode_panel<DType::kFloat8E4M3>;
  const uint8_t* b = args.b + panel * panel_bytes(args.k);
  const int64_t tiles = div_up(rows.end - rows.begin, kRows);
  __builtin_memset(sums, 0, (rows.end - rows.begin) * kPanel * sizeof(float));
  for (int64_t k = 0; k < args.k; k += kDepth) {
    const int64_t depth = args.k - k < kDepth ? args.k - k : kDepth;
    decode(b + k * kPanel, div_up(depth, 4), decoded);
    int64_t row = rows.begin;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t count = div_up(rows.end - row, tiles - tile);
      kTileKernels[count](args.a + row * args.a_stride + 4 * k, args.a_stride, decoded, depth,
                          sums + (row - rows.begin) * kPanel);
      row += count;
    }
  }
  const ColumnScales columns(args, panel);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    store_row(args, columns, row, sums + (row - rows.begin) * kPanel);
  }
}

void gemm_fp8_avx2(const GemmArgs& args, Range rows, Range panels) {
  for (int64_t row = rows.begin; row < rows.end; row += kBlockRows) {
    const int64_t end = row + kBlockRows < rows.end ? row + kBlockRows : rows.end;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) gemm_panel(args, {row, end}, panel);
  }
}

}  // namespace

constexpr GemmKernels kFp8Avx2 = {"avx2", gemm_fp8_avx2, /*block_bytes=*/1 << 21, widen_fp32_portable,
                                  /*element_size=*/4};

}  // namespace sq

#endif
