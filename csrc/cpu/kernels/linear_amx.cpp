// With tdpbf16ps: rows of the weight are the first operand, as they lie in memory, and up to 32 rows of x, transposed, the
// second. A block is 32 columns of y: 4 tiles of sums, 2 of weight, 2 of x.
#include <algorithm>

#include "cpu/kernels/amx.h"
#include "cpu/kernels/linear.h"
#include "cpu/kernels/scratch.h"

#if SQ_X86

namespace sq {
namespace {

constexpr int64_t kDepth = 32;  // of a step
constexpr int64_t kRows = 32;   // of x at a time
constexpr int64_t kTilesPerStep = kRows / kTileRows;

// x [rows, k] to [steps][2][16 pairs of k][16 rows][2]. What lies beyond k is 0; rows that are not there make sums that nobody
// reads, and are left as they are.
void transpose(const LinearArgs& args, Range rows, int64_t steps, uint8_t* tiles) {
  constexpr int64_t kStepBytes = kTilesPerStep * kTileBytes;
  if (args.k % kDepth != 0) std::fill(tiles + (steps - 1) * kStepBytes, tiles + steps * kStepBytes, uint8_t{0});
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t place = row - rows.begin;
    uint8_t* column = tiles + place / kTileRows * kTileBytes + place % kTileRows * 4;
    const BFloat16* x = args.x + row * args.k;
    for (int64_t k = 0; k < args.k; k += 2) {
      const int64_t bytes = 2 * std::min<int64_t>(2, args.k - k);
      __builtin_memcpy(column + k / kDepth * kStepBytes + k % kDepth / 2 * 64, x + k, bytes);
    }
  }
}

// The last step of 32 rows of the weight, where a row ends within it.
SQ_AMX_INLINE void copy_last(const LinearArgs& args, int64_t column, int64_t whole, uint8_t* last) {
  const auto mask = static_cast<__mmask32>(lane_mask(args.k - whole, kDepth));
  for (int64_t row = 0; row < kLinearColumns; ++row) {
    _mm512_store_si512(last + row * 64, _mm512_maskz_loadu_epi16(mask, args.w + (column + row) * args.k + whole));
  }
}

// 32 rows of w times up to 16, or with kWide 32, rows of x.
template <bool kWide>
SQ_AMX_INLINE void step(const void* w, int64_t w_bytes, const uint8_t* x) {
  _tile_loadd(4, w, w_bytes);
  _tile_loadd(5, static_cast<const uint8_t*>(w) + kTileRows * w_bytes, w_bytes);
  _tile_loadd(6, x, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(2, 5, 6);
  if constexpr (kWide) {
    _tile_loadd(7, x + kTileBytes, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// sums[32 columns of y][32 rows].
template <bool kWide>
SQ_AMX_INLINE void multiply_block(const LinearArgs& args, int64_t column, const uint8_t* x, float* sums) {
  alignas(64) uint8_t last[kLinearColumns * 64];
  const int64_t whole = args.k / kDepth * kDepth, row_bytes = args.k * 2;
  const BFloat16* w = args.w + column * args.k;
  const auto* next = reinterpret_cast<const char*>(w + kLinearColumns * args.k);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t k = 0; k < whole; k += kDepth) {
    // The next block, line by line in order: its rows are too many streams for the hardware to follow.
    for (int64_t line = 0; line < kLinearColumns; ++line, next += 64) _mm_prefetch(next, _MM_HINT_T1);
    step<kWide>(w + k, row_bytes, x);
    x += kTilesPerStep * kTileBytes;
  }
  if (whole < args.k) {
    copy_last(args, column, whole, last);
    finish_stores();
    step<kWide>(last, 64, x);
  }
  _tile_stored(0, sums, kRows * 4);
  _tile_stored(2, sums + kTileRows * kRows, kRows * 4);
  if constexpr (kWide) {
    _tile_stored(1, sums + kTileRows, kRows * 4);
    _tile_stored(3, sums + kTileRows * kRows + kTileRows, kRows * 4);
  }
}

// 32 columns of y for these rows.
SQ_AMX_INLINE void store_block(const LinearArgs& args, Range rows, int64_t column, const float* sums) {
  const __m512i lanes = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                           _mm512_set1_epi32(kRows));
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    __m512 values[2];
    for (int64_t half = 0; half < 2; ++half) {
      const float* source = sums + half * kTileRows * kRows + row - rows.begin;
      values[half] = _mm512_i32gather_ps(lanes, source, 4);
      if (args.bias != nullptr) {
        const auto* bias = reinterpret_cast<const __m256i*>(args.bias + column + half * kTileRows);
        values[half] = _mm512_add_ps(values[half], widen_bf16(_mm256_loadu_si256(bias)));
      }
    }
    store_floats<DType::kBFloat16>(args.y + row * args.n + column, ~0u, values[0], values[1]);
  }
}

SQ_AMX void linear_amx(const LinearArgs& args, Range columns) {
  const int64_t last = columns.begin + (columns.end - columns.begin) / kLinearColumns * kLinearColumns;
  if (last == columns.begin) return kLinearAvx512Bf16.run(args, columns);
  const Tiles configured;
  const int64_t steps = div_up(args.k, kDepth);
  alignas(64) float sums[kLinearColumns * kRows];
  Scratch scratch(steps * kTilesPerStep * kTileBytes);
  for (int64_t row = 0; row < args.m; row += kRows) {
    const Range rows{row, std::min(args.m, row + kRows)};
    transpose(args, rows, steps, scratch.data());
    finish_stores();
    for (int64_t column = columns.begin; column < last; column += kLinearColumns) {
      rows.end - rows.begin > kTileRows ? multiply_block<true>(args, column, scratch.data(), sums)
                                        : multiply_block<false>(args, column, scratch.data(), sums);
      store_block(args, rows, column, sums);
    }
  }
  if (last < columns.end) kLinearAvx512Bf16.run(args, {last, columns.end});
}

}  // namespace

constexpr LinearKernels kLinearAmx = {"amx", linear_amx};

}  // namespace sq

#endif
