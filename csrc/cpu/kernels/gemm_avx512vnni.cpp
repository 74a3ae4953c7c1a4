// INT8 product with vpdpbusd: every instruction multiplies 64 bytes of the weight (16 columns, 4 k) by 4 broadcast bytes
// of a row. A micro kernel holds up to 6 rows x 64 columns: 24 accumulators, 4 registers of weight, 1 of activation.
//
//   for panel: for depth chunk: for tile of rows: micro kernel over the chunk
//
// The weight comes from memory once a call, everything else from cache, and what costs time is waiting for it: the first
// tiles of a chunk prefetch the next chunk, so that memory is read while the sums of this one are computed.
#include "cpu/kernels/avx512.h"

#if SQ_X86

namespace sq {
namespace {

// Chosen on Zen 5 (1 MB of L2), November 2026. With up to three tiles, which take little longer than the memory, a chunk
// and the next one stay in L1; with more, in L2; with one, nothing is read twice and memory is all.
constexpr int64_t kRows = 6;
constexpr int64_t kBlockRows = 252;  // rows whose sums wait for the next depth chunk: 63 KB
constexpr int64_t kFewTiles = 3;
constexpr int64_t kShallow4 = 256 / 4;  // depth of a chunk in groups of 4 k: 16 KB
constexpr int64_t kDeep4 = 2048 / 4;    // 128 KB
constexpr int64_t kStreamAhead = 8192;  // bytes
constexpr int64_t kLine = 64;           // bytes of a cache line

// The intrinsic makes gcc 12 copy the accumulator before every use, at half the speed.
SQ_AVX512_INLINE void dot4(__m512i& sum, __m512i a, __m512i b) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}

SQ_AVX512_INLINE __m512i broadcast4(const uint8_t* a) {
  int32_t bytes;
  __builtin_memcpy(&bytes, a, sizeof bytes);
  return _mm512_set1_epi32(bytes);
}

// sums[r][0..64) = start[r][..] + the products of kCount rows of a with depth4 groups of the panel. The rows of `start`
// are 0 apart where all begin with the same values. kLines cache lines a step are prefetched from `next` on.
// Accumulators are named one by one, because gcc keeps an array of them in memory.
template <int kCount, int kLines>
SQ_AVX512 void micro_kernel(Strided<const uint8_t> a, const uint8_t* b, int64_t depth4, Strided<const int32_t> start,
                            int32_t* sums, const uint8_t* next) {
#define SQ_FOR_ROWS(STEP) STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5)
#define SQ_LOAD_ROW(r)                                               \
  __m512i s##r##0, s##r##1, s##r##2, s##r##3;                        \
  if constexpr (r < kCount) {                                        \
    s##r##0 = _mm512_load_si512(start.data + r * start.stride);      \
    s##r##1 = _mm512_load_si512(start.data + r * start.stride + 16); \
    s##r##2 = _mm512_load_si512(start.data + r * start.stride + 32); \
    s##r##3 = _mm512_load_si512(start.data + r * start.stride + 48); \
  }
#define SQ_DOT_ROW(r)                                        \
  if constexpr (r < kCount) {                                \
    const __m512i value = broadcast4(a.data + r * a.stride); \
    dot4(s##r##0, value, b0);                                \
    dot4(s##r##1, value, b1);                                \
    dot4(s##r##2, value, b2);                                \
    dot4(s##r##3, value, b3);                                \
  }
#define SQ_STORE_ROW(r)                                  \
  if constexpr (r < kCount) {                            \
    _mm512_store_si512(sums + r * kPanel, s##r##0);      \
    _mm512_store_si512(sums + r * kPanel + 16, s##r##1); \
    _mm512_store_si512(sums + r * kPanel + 32, s##r##2); \
    _mm512_store_si512(sums + r * kPanel + 48, s##r##3); \
  }
  SQ_FOR_ROWS(SQ_LOAD_ROW)
#pragma GCC unroll 2
  for (int64_t k4 = 0; k4 < depth4; ++k4) {
    const __m512i b0 = _mm512_loadu_si512(b), b1 = _mm512_loadu_si512(b + 64);
    const __m512i b2 = _mm512_loadu_si512(b + 128), b3 = _mm512_loadu_si512(b + 192);
#pragma GCC unroll 4
    for (int line = 0; line < kLines; ++line) {
      _mm_prefetch(reinterpret_cast<const char*>(next + line * kLine), _MM_HINT_T0);
    }
    next += kLines * kLine;
    SQ_FOR_ROWS(SQ_DOT_ROW)
    a.data += 4;
    b += 4 * kPanel;
  }
  SQ_FOR_ROWS(SQ_STORE_ROW)
#undef SQ_FOR_ROWS
#undef SQ_LOAD_ROW
#undef SQ_DOT_ROW
#undef SQ_STORE_ROW
}

using MicroKernel = decltype(&micro_kernel<1, 0>);
template <int kLines>
constexpr MicroKernel kMicroKernels[] = {nullptr,
                                         micro_kernel<1, kLines>,
                                         micro_kernel<2, kLines>,
                                         micro_kernel<3, kLines>,
                                         micro_kernel<4, kLines>,
                                         micro_kernel<5, kLines>,
                                         micro_kernel<6, kLines>};

// How the panels of a block of rows are walked. A step of the micro kernel reads 4 cache lines of the weight, so that
// 4 / lines tiles prefetch a whole chunk.
struct Walk {
  int64_t tiles;
  int64_t depth4;  // of a chunk
  int64_t lines;   // prefetched a step
  const MicroKernel* fetching;
};

Walk walk_of(int64_t rows) {
  const int64_t tiles = div_up(rows, kRows);
  if (tiles == 1) return {tiles, kDeep4, 4, kMicroKernels<4>};
  if (tiles <= kFewTiles) return {tiles, kShallow4, 2, kMicroKernels<2>};
  return {tiles, kDeep4, 1, kMicroKernels<1>};
}

template <DType kOut, bool kBias>
SQ_AVX512 void gemm_panel(const GemmArgs& args, const Walk& walk, const PanelColumns& columns, int64_t panel,
                          Range rows) {
  alignas(64) int32_t sums[kBlockRows * kPanel];
  // The stream ahead must not skip what lies between K and its multiple of 64: what it skips is fetched too late.
  const int64_t used4 = walk.tiles == 1 ? padded_k(args.k) / 4 : div_up(args.k, 4);
  const uint8_t* b = args.b + panel * panel_bytes(args.k);
  for (int64_t k4 = 0; k4 == 0 || k4 < used4; k4 += walk.depth4) {
    const int64_t depth4 = used4 - k4 < walk.depth4 ? used4 - k4 : walk.depth4;
    const bool is_last = k4 + walk.depth4 >= used4;
    const uint8_t* chunk = b + k4 * 4 * kPanel;
    const uint8_t* next = chunk + (walk.tiles == 1 ? kStreamAhead : depth4 * 4 * kPanel);
    int64_t row = rows.begin;
    for (int64_t tile = 0; tile < walk.tiles; ++tile) {
      const int64_t count = div_up(rows.end - row, walk.tiles - tile);
      int32_t* block = sums + (row - rows.begin) * kPanel;
      const MicroKernel* kernels = tile < 4 / walk.lines ? walk.fetching : kMicroKernels<0>;
      const Strided<const int32_t> start = {k4 == 0 ? columns.start : block, k4 == 0 ? 0 : kPanel};
      kernels[count]({args.a + row * args.a_stride + 4 * k4, args.a_stride}, chunk, depth4, start, block,
                     next + tile * depth4 * walk.lines * kLine);
      if (is_last) store_panel<kOut, kBias>(args, columns, row, count, block);
      row += count;
    }
  }
}

template <DType kOut, bool kBias>
SQ_AVX512 void gemm_range(const GemmArgs& args, Range rows, Range panels) {
  PanelColumns columns;
  for (int64_t row = rows.begin; row < rows.end; row += kBlockRows) {
    const int64_t end = row + kBlockRows < rows.end ? row + kBlockRows : rows.end;
    const Walk walk = walk_of(end - row);
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      load_columns(args, panel, &columns);
      gemm_panel<kOut, kBias>(args, walk, columns, panel, {row, end});
    }
  }
}

void gemm_int8_avx512vnni(const GemmArgs& args, Range rows, Range panels) {
  SQ_DISPATCH_OUTPUT(gemm_range, args, rows, panels);
}

}  // namespace

constexpr GemmKernels kInt8Avx512Vnni = {"avx512vnni", gemm_int8_avx512vnni, /*block_bytes=*/1 << 19, nullptr,
                                         /*element_size=*/1};

}  // namespace sq

#endif
