// FP8 product with vdpbf16ps, which multiplies pairs of bf16 and adds them to fp32. Chunks of a panel of the weight are
// decoded into cache and multiplied by activations that were widened before; a micro kernel holds 6 rows x 64 columns.
// For up to 6 rows the decoded values stay in registers. The order of the sums is the same. Subnormals, which vdpbf16ps takes for zero, do not occur: fp8 values are normal in bf16, and sums are multiples
// of e5m2's smallest value squared, 2^-32.
//
//   for panel: for depth chunk: decode it; for tile of rows: micro kernel, the first of which prefetch the next chunk
#include "cpu/kernels/fp8_bf16.h"

#if SQ_X86

namespace sq {
namespace {

constexpr int64_t kRows = 6;
constexpr int64_t kBlockRows = 252;             // rows whose sums wait for the next depth chunk: 63 KB
constexpr int64_t kMostDepth = 512;             // of a chunk: 64 KB decoded, in L2
constexpr int64_t kFewTiles = 3;                // with so few, 256: 32 KB, in L1 (Zen 5, November 2026)
constexpr int64_t kLine = 64;                   // bytes of a cache line
constexpr int64_t kStreamAhead = 8192;          // bytes
constexpr int64_t kPairBytes = 2 * 2 * kPanel;  // 64 columns x 2 k, decoded

// `groups` times 4 k of a panel to bf16 [2 * groups][64][2].
SQ_BF16 void decode_chunk(const Bf16Table& table, const uint8_t* b, int64_t groups, uint8_t* decoded) {
  for (int64_t part = 0; part < groups * 4; ++part) {
    uint8_t* target = decoded + part / 4 * 2 * kPairBytes + part % 4 * kLine;
    const WeightPairs pairs = decode_weight_pairs(table, b + part * kLine);
    _mm512_store_si512(target, pairs.first);
    _mm512_store_si512(target + kPairBytes, pairs.second);
  }
}

SQ_BF16_INLINE __m512bh broadcast2(const uint8_t* a) {
  int32_t bits;
  __builtin_memcpy(&bits, a, sizeof bits);
  return reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits));
}

// sums[r][0..64) = kCount rows of a times `groups` times 4 k of a panel, which is read once.
template <int kCount>
SQ_BF16 void stream_kernel(const Bf16Table& table, const uint8_t* a, int64_t a_stride, const uint8_t* b, int64_t groups,
                           float* sums) {
  __m512 sum[kCount][4];
#pragma GCC unroll 6
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_setzero_ps();
  }
  for (int64_t group = 0; group < groups; ++group) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const WeightPairs pairs = decode_weight_pairs(table, b + c * kLine);
      _mm_prefetch(reinterpret_cast<const char*>(b + c * kLine + kStreamAhead), _MM_HINT_T0);
#pragma GCC unroll 6
      for (int r = 0; r < kCount; ++r) {
        const uint8_t* values = a + r * a_stride;
        sum[r][c] = _mm512_dpbf16_ps(sum[r][c], broadcast2(values), reinterpret_cast<__m512bh>(pairs.first));
        sum[r][c] = _mm512_dpbf16_ps(sum[r][c], broadcast2(values + 4), reinterpret_cast<__m512bh>(pairs.second));
      }
    }
    a += 8;
    b += 4 * kPanel;
  }
#pragma GCC unroll 6
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) _mm512_store_ps(sums + r * kPanel + 16 * c, sum[r][c]);
  }
}

using StreamKernel = void (*)(const Bf16Table&, const uint8_t*, int64_t, const uint8_t*, int64_t, float*);
constexpr StreamKernel kStreamKernels[] = {nullptr,          stream_kernel<1>, stream_kernel<2>, stream_kernel<3>,
                                           stream_kernel<4>, stream_kernel<5>, stream_kernel<6>};

// sums[r][0..64) += kCount rows of a times a decoded chunk of `pairs` times 2 k. With kFetch, a cache line a step is
// prefetched from `next` on.
template <int kCount, bool kFetch>
SQ_BF16 void micro_kernel(const uint8_t* a, int64_t a_stride, const uint8_t* b, int64_t pairs, float* sums,
                          const uint8_t* next) {
  __m512 sum[kCount][4];
#pragma GCC unroll 6
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_load_ps(sums + r * kPanel + 16 * c);
  }
  for (int64_t pair = 0; pair < pairs; ++pair) {
    __m512bh columns[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) columns[c] = reinterpret_cast<__m512bh>(_mm512_load_si512(b + c * kLine));
    if constexpr (kFetch) _mm_prefetch(reinterpret_cast<const char*>(next + pair * kLine), _MM_HINT_T0);
#pragma GCC unroll 6
    for (int r = 0; r < kCount; ++r) {
      const __m512bh value = broadcast2(a + r * a_stride + 4 * pair);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_dpbf16_ps(sum[r][c], value, columns[c]);
    }
    b += kPairBytes;
  }
#pragma GCC unroll 6
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) _mm512_store_ps(sums + r * kPanel + 16 * c, sum[r][c]);
  }
}

using MicroKernel = void (*)(const uint8_t*, int64_t, const uint8_t*, int64_t, float*, const uint8_t*);
template <bool kFetch>
constexpr MicroKernel kMicroKernels[] = {nullptr,
                                         micro_kernel<1, kFetch>,
                                         micro_kernel<2, kFetch>,
                                         micro_kernel<3, kFetch>,
                                         micro_kernel<4, kFetch>,
                                         micro_kernel<5, kFetch>,
                                         micro_kernel<6, kFetch>};

void multiply_chunks(const GemmArgs& args, const Bf16Table& table, const uint8_t* b, Range rows, float* sums) {
  alignas(64) uint8_t decoded[kMostDepth / 2 * kPairBytes];
  const int64_t tiles = div_up(rows.end - rows.begin, kRows);
  const int64_t depth = tiles <= kFewTiles ? kMostDepth / 2 : kMostDepth;
  __builtin_memset(sums, 0, (rows.end - rows.begin) * kPanel * sizeof(float));
  for (int64_t k = 0; k < args.k; k += depth) {
    const int64_t groups = div_up(args.k - k < depth ? args.k - k : depth, 4);
    const uint8_t* next = b + (k + depth) * kPanel;
    decode_chunk(table, b + k * kPanel, groups, decoded);
    int64_t row = rows.begin;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t count = div_up(rows.end - row, tiles - tile);
      // Two tiles of depth / 2 steps pass over the lines of a chunk.
      const MicroKernel* kernels = tile < 2 ? kMicroKernels<true> : kMicroKernels<false>;
      kernels[count](args.a + row * args.a_stride + 2 * k, args.a_stride, decoded, 2 * groups,
                     sums + (row - rows.begin) * kPanel, next + tile * depth / 2 * kLine);
      row += count;
    }
  }
}

template <DType kOut, bool kBias>
SQ_BF16 void gemm_panel(const GemmArgs& args, const Bf16Table& table, const PanelColumns& columns, Range rows) {
  alignas(64) float sums[kBlockRows * kPanel];
  const int64_t count = rows.end - rows.begin;
  const uint8_t* b = args.b + columns.first / kPanel * panel_bytes(args.k);
  if (count <= kRows) {
    // Through the padding too: what the stream ahead skips would be fetched too late.
    kStreamKernels[count](table, args.a + rows.begin * args.a_stride, args.a_stride, b, padded_k(args.k) / 4, sums);
  } else {
    multiply_chunks(args, table, b, rows, sums);
  }
  store_panel<kOut, kBias>(args, columns, rows.begin, count, sums);
}

template <DType kOut, bool kBias>
SQ_BF16 void gemm_range(const GemmArgs& args, Range rows, Range panels) {
  const Bf16Table& table = bf16_table(args.b_dtype);
  PanelColumns columns;
  for (int64_t row = rows.begin; row < rows.end; row += kBlockRows) {
    const int64_t end = row + kBlockRows < rows.end ? row + kBlockRows : rows.end;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      load_columns(args, panel, &columns);
      gemm_panel<kOut, kBias>(args, table, columns, {row, end});
    }
  }
}

// Words of 64 values, from their low and high bytes, in order: the unpacks work within 128-bit lanes.
SQ_BF16_INLINE void store_words(__m512i low, __m512i high, uint8_t* target) {
  const __m512i first = _mm512_unpacklo_epi8(low, high), second = _mm512_unpackhi_epi8(low, high);
  const __m512i begin = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                end = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  _mm512_storeu_si512(target, _mm512_permutex2var_epi64(first, begin, second));
  _mm512_storeu_si512(target + 64, _mm512_permutex2var_epi64(first, end, second));
}

SQ_BF16 void widen_rows(const WidenArgs& args, Range rows) {
  const Bf16Table& table = bf16_table(args.dtype);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t k = 0; k < args.k; k += 64) {
      const uint8_t* q = args.q + row * args.q_stride + k;
      __m512i low, high;
      decode_bf16(table, _mm512_maskz_loadu_epi8(lane_mask(args.k - k, 64), q), &low, &high);  // 0 beyond K
      store_words(low, high, args.wide + row * args.wide_stride + 2 * k);
    }
  }
}

void gemm_fp8_avx512bf16(const GemmArgs& args, Range rows, Range panels) {
  SQ_DISPATCH_OUTPUT(gemm_range, args, rows, panels);
}

}  // namespace

constexpr GemmKernels kFp8Avx512Bf16 = {"avx512bf16", gemm_fp8_avx512bf16, /*block_bytes=*/1 << 21, widen_bf16_avx512,
                                        /*element_size=*/2};

void widen_bf16_avx512(const WidenArgs& args, Range rows) { widen_rows(args, rows); }

}  // namespace sq

#endif
