// INT8 product in 16 registers of 256 bits, for gemm_avx2.cpp and gemm_avxvnni.cpp, which bring the instructions: a class
// W as described at micro_kernel. A micro kernel holds up to 6 rows x 2 registers of columns: 12 accumulators, 2 registers
// of weight, 1 of activation, 1 to spare.
//
//   for panel: for depth chunk: for tile of rows: for slice of columns: micro kernel over the chunk
//
// A slice reads a part of every 256 bytes of the chunk, which therefore stays in L1. The first tile prefetches the next
// chunk, so that memory is read while the sums of this one are computed.
#include "cpu/kernels/avx2.h"
#include "cpu/kernels/epilogue.h"
#include "cpu/kernels/gemm.h"

#if SQ_X86

namespace sq {
namespace {

// Chosen on Zen 5 (48 KB of L1, 1 MB of L2), November 2026.
constexpr int64_t kRows = 6;
constexpr int64_t kBlockRows = 252;  // rows whose sums wait for the next depth chunk: 63 KB
constexpr int64_t kDepth4 = 64;      // depth of a chunk in groups of 4 k: 16 KB
constexpr int64_t kLine = 64;        // bytes of a cache line

// Where the next chunk is prefetched from, line by line; a step of 0 touches one line again and again.
struct Prefetch {
  const uint8_t* from;
  int64_t step;
};

// sums[r][columns] = start[r][columns] + the products of kCount rows of a with depth4 groups of kVecs registers of the
// panel. The rows of `start` are 0 apart where all begin with the same values.
//   W::kColumns          columns in a register of weight
//   W::kBytes            of activation in 4 k
//   W::load, broadcast   the operands of 4 k
//   W::multiply_add      sum + a * b
//   W::columns           8 columns from the accumulators of a row
template <class W, int kCount, int kVecs>
SQ_AVX2 void micro_kernel(Strided<const uint8_t> a, const uint8_t* b, int64_t depth4, Strided<const int32_t> start,
                          int32_t* sums, Prefetch next) {
  constexpr int kLines = kVecs * W::kColumns > 16 ? kVecs * W::kColumns / 16 : 1;
  __m256i acc[kCount][kVecs];
#pragma GCC unroll 6
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[r][v] = _mm256_setzero_si256();
  }
  for (int64_t k4 = 0; k4 < depth4; ++k4) {
#pragma GCC unroll 4
    for (int line = 0; line < kLines; ++line) {
      _mm_prefetch(reinterpret_cast<const char*>(next.from + line * kLine), _MM_HINT_T0);
    }
    next.from += next.step * kLines;
    __m256i column[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) column[v] = W::load(b + v * W::kColumns * 4);
#pragma GCC unroll 6
    for (int r = 0; r < kCount; ++r) {
      const __m256i value = W::broadcast(a.data + r * a.stride);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) W::multiply_add(acc[r][v], value, column[v]);
    }
    a.data += W::kBytes;
    b += 4 * kPanel;
  }
#pragma GCC unroll 6
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kVecs * W::kColumns / 8; ++i) {
      const auto* from = reinterpret_cast<const __m256i*>(start.data + r * start.stride) + i;
      auto* to = reinterpret_cast<__m256i*>(sums + r * kPanel) + i;
      _mm256_store_si256(to, _mm256_add_epi32(_mm256_load_si256(from), W::columns(acc[r], i)));
    }
  }
}

// A tile of kCount rows times a chunk of the panel, in slices of columns.
template <class W, int kCount>
void tile_kernel(Strided<const uint8_t> a, const uint8_t* b, int64_t depth4, Strided<const int32_t> start,
                 int32_t* sums, bool prefetches) {
  // Few rows need more columns for enough independent sums, and read the weight in longer pieces.
  constexpr int kVecs = kCount == 1 ? 8 : kCount == 2 ? 4 : 2;
  constexpr int64_t kSlice = kVecs * W::kColumns;
  const uint8_t* next = b + depth4 * 4 * kPanel;
  for (int64_t column = 0; column < kPanel; column += kSlice) {
    const int64_t fetched = column / kSlice * (kSlice > 16 ? kSlice / 16 : 1);  // of the 4 lines of a step
    const bool fetches = prefetches && fetched < 4;
    const Prefetch prefetch = fetches ? Prefetch{next + fetched * depth4 * kLine, kLine} : Prefetch{b, 0};
    micro_kernel<W, kCount, kVecs>(a, b + 4 * column, depth4, {start.data + column, start.stride}, sums + column,
                                   prefetch);
  }
}

template <class W>
constexpr decltype(&tile_kernel<W, 1>) kTileKernels[] = {nullptr,           tile_kernel<W, 1>, tile_kernel<W, 2>,
                                                         tile_kernel<W, 3>, tile_kernel<W, 4>, tile_kernel<W, 5>,
                                                         tile_kernel<W, 6>};

template <class W>
SQ_AVX2 void gemm_panel(const GemmArgs& args, Range rows, int64_t panel) {
  alignas(64) int32_t sums[kBlockRows * kPanel];
  alignas(64) int32_t start[kPanel];  // -128 * column sum, where the sums of u8 x s8 products begin
  const uint8_t* b = args.b + panel * panel_bytes(args.k);
  __builtin_memcpy(start, b + panel_bytes(args.k) - sizeof start, sizeof start);
  for (int32_t& value : start) value = static_cast<int32_t>(static_cast<uint32_t>(value) * -128u);
  const ColumnScales columns(args, panel);
  const int64_t tiles = div_up(rows.end - rows.begin, kRows), used4 = div_up(args.k, 4);
  for (int64_t k4 = 0; k4 == 0 || k4 < used4; k4 += kDepth4) {
    const int64_t depth4 = used4 - k4 < kDepth4 ? used4 - k4 : kDepth4;
    int64_t row = rows.begin;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t count = div_up(rows.end - row, tiles - tile);
      int32_t* block = sums + (row - rows.begin) * kPanel;
      const typename W::Rows a(args.a + row * args.a_stride + 4 * k4, args.a_stride, count, depth4);
      const Strided<const int32_t> begin = {k4 == 0 ? start : block, k4 == 0 ? 0 : kPanel};
      kTileKernels<W>[count]({a.data, a.stride}, b + k4* 4 * kPanel, depth4, begin, block, tile == 0);
      if (k4 + kDepth4 >= used4) {
        for (int64_t r = 0; r < count; ++r) store_row(args, columns, row + r, block + r * kPanel);
      }
      row += count;
    }
  }
}

template <class W>
void gemm_range(const GemmArgs& args, Range rows, Range panels) {
  for (int64_t row = rows.begin; row < rows.end; row += kBlockRows) {
    const int64_t end = row + kBlockRows < rows.end ? row + kBlockRows : rows.end;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) gemm_panel<W>(args, {row, end}, panel);
  }
}

}  // namespace
}  // namespace sq

#endif
