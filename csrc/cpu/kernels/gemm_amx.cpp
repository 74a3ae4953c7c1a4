// INT8 product with the tile registers of AMX: tdpbusd multiplies 16 rows x 64 bytes of the activation by 64 bytes x 16
// columns of the weight, and the packed weight is already in its layout. A block is 32 rows x 32 columns: 4 tiles of sums,
// 2 of activation, 2 of weight. The last step of a block (scales, bias, cast: as many cycles of the vector units as a short
// product takes of the tile unit) is spread over the tile instructions of the next block.
#include "avx512.h"

#if SQ_X86

#define SQ_AMX_FEATURES SQ_AVX512_FEATURES ",avx512bf16,amx-tile,amx-int8"
#define SQ_AMX __attribute__((target(SQ_AMX_FEATURES)))
#define SQ_AMX_INLINE inline __attribute__((always_inline, target(SQ_AMX_FEATURES)))

namespace sq {
namespace {

constexpr int64_t kBlock = 32;  // rows and columns of a block

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Sums of a block that are still to be finished.
struct Pending {
  alignas(64) int32_t sums[kBlock * kBlock];
  const PanelColumns* columns;
  int64_t row, offset;
  int64_t next = 0, count = 0;  // rows of the block: the next one to finish, and how many there are
};

// What store_sums does, with the hardware's conversion to bf16, which halves the instructions. It flushes subnormals to
// zero, so that it is for rows whose values are either 0 or above 2^-126: a product is an integer times a scale of at
// least kSmallestScale, and a sum of two such numbers is a multiple of the smaller one's last bit, 2^-23 of it.
constexpr float kSmallestScale = 0x1p-100f;

template <bool kBias>
SQ_AMX_INLINE void store_sums_bf16(const GemmArgs& args, const PanelColumns& columns, int64_t row, int64_t offset,
                                   const int32_t* sums) {
  const float a_scale = args.a_scale[row * args.a_scale_step];
  const __m512 low = scale_sums<kBias>(columns, offset, a_scale, sums);
  const __m512 high = scale_sums<kBias>(columns, offset + 16, a_scale, sums + 16);
  const auto mask = static_cast<__mmask32>(columns.mask >> offset);
  _mm512_mask_storeu_epi16(output_address<DType::kBFloat16>(args, row, columns.first + offset), mask,
                           (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

template <DType kOut, bool kBias>
SQ_AMX_INLINE void finish_rows(const GemmArgs& args, Pending& block, int64_t count) {
  const int64_t end = block.next + count < block.count ? block.next + count : block.count;
  const PanelColumns& columns = *block.columns;
  for (; block.next < end; ++block.next) {
    const int64_t row = block.row + block.next;
    const int32_t* sums = block.sums + block.next * kBlock;
    if (kOut == DType::kBFloat16 && args.a_scale[row * args.a_scale_step] * columns.smallest >= kSmallestScale) {
      store_sums_bf16<kBias>(args, columns, row, block.offset, sums);
    } else {
      store_sums<kOut, kBias>(args, columns, row, block.offset, sums);
    }
  }
}

template <DType kOut, bool kBias>
SQ_AMX void gemm_range(const GemmArgs& args, Range rows, Range panels) {
  static const TileConfig config;
  _tile_loadconfig(&config);
  const int64_t steps = padded_k(args.k) / 64;
  const int64_t rows_per_step = div_up(kBlock, steps > 0 ? steps : 1);
  PanelColumns columns[2];
  Pending pending[2];
  int which = 0;
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    PanelColumns& here = columns[panel & 1];
    load_columns(args, panel, &here);
    const uint8_t* b_panel = args.b + panel * panel_bytes(args.k);
    for (int64_t offset = 0; offset < here.count; offset += kBlock) {
      for (int64_t row = rows.begin; row < rows.end; row += kBlock) {
        const int64_t count = rows.end - row < kBlock ? rows.end - row : kBlock;
        Pending& before = pending[which ^ 1];
        Pending& now = pending[which];
        const uint8_t* a0 = args.a + row * args.a_stride;
        const uint8_t* a1 = a0 + 16 * args.a_stride;
        const uint8_t* b = b_panel + 4 * offset;
        // Stride 0: every row of sums starts with the same values.
        _tile_loadd(0, here.start + offset, 0);
        _tile_loadd(1, here.start + offset + 16, 0);
        if (count > 16) {
          _tile_loadd(2, here.start + offset, 0);
          _tile_loadd(3, here.start + offset + 16, 0);
          for (int64_t step = 0; step < steps; ++step) {
            _tile_loadd(4, a0, args.a_stride);
            _tile_loadd(6, b, 4 * kPanel);
            _tile_loadd(7, b + 64, 4 * kPanel);
            _tile_dpbusd(0, 4, 6);
            _tile_loadd(5, a1, args.a_stride);
            _tile_dpbusd(1, 4, 7);
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
            finish_rows<kOut, kBias>(args, before, rows_per_step);
            a0 += 64;
            a1 += 64;
            b += 64 * kPanel;
          }
          _tile_stored(2, now.sums + 16 * kBlock, kBlock * 4);
          _tile_stored(3, now.sums + 16 * kBlock + 16, kBlock * 4);
        } else {
          for (int64_t step = 0; step < steps; ++step) {
            _tile_loadd(4, a0, args.a_stride);
            _tile_loadd(6, b, 4 * kPanel);
            _tile_loadd(7, b + 64, 4 * kPanel);
            _tile_dpbusd(0, 4, 6);
            _tile_dpbusd(1, 4, 7);
            finish_rows<kOut, kBias>(args, before, rows_per_step);
            a0 += 64;
            b += 64 * kPanel;
          }
        }
        finish_rows<kOut, kBias>(args, before, kBlock);
        _tile_stored(0, now.sums, kBlock * 4);
        _tile_stored(1, now.sums + 16, kBlock * 4);
        now.columns = &here;
        now.row = row;
        now.offset = offset;
        now.next = 0;
        now.count = count;
        which ^= 1;
      }
    }
  }
  finish_rows<kOut, kBias>(args, pending[which ^ 1], kBlock);
  _tile_release();
}

// Below this many rows the tiles are so empty that vpdpbusd is faster.
constexpr int64_t kFewestRows = 9;

}  // namespace

void gemm_int8_amx(const GemmArgs& args, Range rows, Range panels) {
  if (rows.end - rows.begin < kFewestRows) return gemm_int8_avx512vnni(args, rows, panels);
  SQ_DISPATCH_OUTPUT(gemm_range, args, rows, panels);
}

}  // namespace sq

#endif
