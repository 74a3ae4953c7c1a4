// Attention in bf16 with the tile registers of AMX, whose second operand is what vdpbf16ps takes too.
#include "cpu/kernels/amx.h"

#if SQ_X86
#define SQ_ATTENTION_TARGET SQ_AMX
#include "cpu/kernels/attention_avx512_bf16.h"

namespace sq {
namespace {

struct Amx : Avx512Bf16 {
  static constexpr int kDepth = 32, kHeight = kTileRows, kKeys = 256, kStripe = 32;
};

// Of 16 or 32 rows and 32 columns.
template <bool kTall>
SQ_AMX_INLINE void multiply_tiles(Strided<const uint16_t> a_rows, const uint16_t* b, int64_t depth, bool is_added,
                                  Strided<float> target) {
  const auto [a, a_stride] = a_rows;
  const auto [sums, stride] = target;
  constexpr int64_t kColumns = Amx::kVecs * Amx::kLanes, kColumnBytes = kColumns * 4;
  const int64_t row_bytes = stride * 4, a_bytes = a_stride * 2;
  float* below = sums + kTileRows * stride;
  if (is_added) {
    _tile_loadd(0, sums, row_bytes);
    _tile_loadd(1, sums + 16, row_bytes);
    if constexpr (kTall) {
      _tile_loadd(2, below, row_bytes);
      _tile_loadd(3, below + 16, row_bytes);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (kTall) {
      _tile_zero(2);
      _tile_zero(3);
    }
  }
  for (int64_t k = 0; k < depth; k += Amx::kDepth) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, b, kColumnBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 32, kColumnBytes);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTall) {
      _tile_loadd(5, a + k + kTileRows * a_stride, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    b += Amx::kDepth * kColumns;
  }
  _tile_stored(0, sums, row_bytes);
  _tile_stored(1, sums + 16, row_bytes);
  if constexpr (kTall) {
    _tile_stored(2, below, row_bytes);
    _tile_stored(3, below + 16, row_bytes);
  }
}

template <>
struct Products<Amx> {
  SQ_AMX static void multiply(Strided<const uint16_t> a, int64_t rows, const Panels<uint16_t>& b, int64_t depth,
                              const float* factor, Strided<float> target) {
    const auto [sums, stride] = target;
    const int64_t panels = b.count;
    constexpr int64_t kColumns = Amx::kVecs * Amx::kLanes, kHalf = kColumns / 2;
    for (int64_t row = 0; factor != nullptr && row < rows; ++row) {
      if (factor[row] == 1.0f) continue;
      for (float* sum = sums + row * stride; sum < sums + row * stride + panels * kColumns; sum += Avx512::kLanes) {
        Avx512::store(Avx512::load(sum) * factor[row], sum);
      }
    }
    finish_stores();
    for (int64_t half = 0; half < 2 * panels; ++half) {
      const uint16_t* columns = b.data + half / 2 * b.depth * kColumns + half % 2 * kHalf * Amx::kPair;
      for (int64_t row = 0; row < rows; row += 2 * kTileRows) {
        const Strided<const uint16_t> a_row = {a.data + row * a.stride, a.stride};
        const Strided<float> block = {sums + row * stride + half * kHalf, stride};
        rows - row > kTileRows ? multiply_tiles<true>(a_row, columns, depth, factor != nullptr, block)
                               : multiply_tiles<false>(a_row, columns, depth, factor != nullptr, block);
      }
    }
  }
};

SQ_AMX void attend_amx(const AttentionArgs& args, const AttentionTask& task) {
  if (args.dtype == DType::kBFloat16) {
    const Tiles tiles;
    attend<Avx512, Amx, BFloat16>(args, task);
  } else {
    kAttentionAvx512.run(args, task);
  }
}

}  // namespace

constexpr AttentionKernels kAttentionAmx = {"amx", attend_amx};

}  // namespace sq

#endif
