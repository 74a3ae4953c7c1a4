// INT8 product with the tile registers of AMX: tdpbusd multiplies 16 rows x 64 bytes of the activation by 64 bytes x 16
// columns of the weight, and the packed weight is already in its layout. A block is 32 rows x 32 columns: 4 tiles of sums,
// 2 of activation, 2 of weight.
//
//   for 32 columns: for depth chunk: copy the weight's chunk; for 32 rows: for 64 k: 4 tile loads, 4 products
//
// The copied chunk stays in L1 while rows pass from L2. In the packed weight itself, 32 of a panel's 64 columns lie in every
// other 128 bytes, so that they would compete for half of the cache sets. The last step of a block (scales, bias, cast) is
// spread over the tile instructions of the next one.
#include "avx512.h"

#if SQ_X86

#define SQ_AMX_FEATURES SQ_AVX512_FEATURES ",avx512bf16,amx-tile,amx-int8"
#define SQ_AMX __attribute__((target(SQ_AMX_FEATURES)))
#define SQ_AMX_INLINE inline __attribute__((always_inline, target(SQ_AMX_FEATURES)))

namespace sq {
namespace {

constexpr int64_t kBlock = 32;        // rows and columns of a block
constexpr int64_t kMaxRows = 512;     // whose sums wait for the next chunk: 64 KB
constexpr int64_t kMaxSteps = 9;       // of 64 k in a chunk: 18 KB of weight
constexpr int64_t kFewestCopied = 192;  // rows for which a copy of the weight pays
constexpr int64_t kFewestRows = 9;    // below, the tiles are so empty that vpdpbusd is faster

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A block whose sums are still to be finished.
struct Pending {
  const int32_t* sums;
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
  if (block.next == end) return;
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

// 32 columns of the weight, a depth chunk of them: where they are and how.
struct Weight {
  const uint8_t* data;
  int64_t row_bytes;     // from one group of 4 k to the next
  int64_t second_bytes;  // from the first 16 columns to the second
  int64_t step_bytes;    // from one 64 k to the next
};

constexpr int64_t kTileBytes = 1024;

// Tile after tile, the two of a step side by side.
SQ_AMX_INLINE Weight copy_weight(const uint8_t* b, int64_t steps, uint8_t* copy) {
  for (int64_t group = 0; group < steps * 16; ++group) {
    uint8_t* target = copy + group / 16 * 2 * kTileBytes + group % 16 * 64;
    _mm512_store_si512(target, _mm512_loadu_si512(b + group * 4 * kPanel));
    _mm512_store_si512(target + kTileBytes, _mm512_loadu_si512(b + group * 4 * kPanel + 64));
  }
  return {copy, 64, kTileBytes, 2 * kTileBytes};
}

// sums[32][32] = start + the products of up to 32 rows of a with `steps` times 64 k. The rows of `start` are start_bytes
// apart: 0 where all begin with the same values.
template <DType kOut, bool kBias>
SQ_AMX_INLINE void multiply_block(const GemmArgs& args, const uint8_t* a, int64_t count, Weight b, int64_t steps,
                                  const int32_t* start, int64_t start_bytes, int32_t* sums, Pending& before) {
  const int64_t rows_per_step = div_up(kBlock, steps);
  const uint8_t* a1 = a + 16 * args.a_stride;
  int32_t* sums1 = sums + 16 * kBlock;
  const int32_t* start1 = start + 16 * start_bytes / 4;
  _tile_loadd(0, start, start_bytes);
  _tile_loadd(1, start + 16, start_bytes);
  if (count > 16) {
    _tile_loadd(2, start1, start_bytes);
    _tile_loadd(3, start1 + 16, start_bytes);
    for (int64_t step = 0; step < steps; ++step) {
      _tile_loadd(4, a + 64 * step, args.a_stride);
      _tile_loadd(6, b.data, b.row_bytes);
      _tile_loadd(7, b.data + b.second_bytes, b.row_bytes);
      _tile_dpbusd(0, 4, 6);
      _tile_loadd(5, a1 + 64 * step, args.a_stride);
      _tile_dpbusd(1, 4, 7);
      _tile_dpbusd(2, 5, 6);
      _tile_dpbusd(3, 5, 7);
      b.data += b.step_bytes;
      finish_rows<kOut, kBias>(args, before, rows_per_step);
    }
    finish_rows<kOut, kBias>(args, before, kBlock);
    _tile_stored(2, sums1, kBlock * 4);
    _tile_stored(3, sums1 + 16, kBlock * 4);
  } else {
    for (int64_t step = 0; step < steps; ++step) {
      _tile_loadd(4, a + 64 * step, args.a_stride);
      _tile_loadd(6, b.data, b.row_bytes);
      _tile_loadd(7, b.data + b.second_bytes, b.row_bytes);
      _tile_dpbusd(0, 4, 6);
      _tile_dpbusd(1, 4, 7);
      b.data += b.step_bytes;
      finish_rows<kOut, kBias>(args, before, rows_per_step);
    }
    finish_rows<kOut, kBias>(args, before, kBlock);
  }
  _tile_stored(0, sums, kBlock * 4);
  _tile_stored(1, sums + 16, kBlock * 4);
}

// 32 columns of y, from `offset` columns into the panel on, for up to kMaxRows rows.
template <DType kOut, bool kBias>
SQ_AMX void multiply_columns(const GemmArgs& args, Range rows, const PanelColumns& columns, int64_t offset,
                             int32_t* sums, Pending& pending) {
  alignas(64) uint8_t copy[kMaxSteps * 2 * kTileBytes];
  const uint8_t* b = args.b + columns.first / kPanel * panel_bytes(args.k) + 4 * offset;
  const int64_t steps = padded_k(args.k) / 64;
  const bool is_copied = rows.end - rows.begin >= kFewestCopied;
  const int64_t chunks = is_copied ? div_up(steps, kMaxSteps) : 1;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t step = chunk * steps / chunks;
    const int64_t count = (chunk + 1) * steps / chunks - step;
    const uint8_t* data = b + step * 64 * kPanel;
    const Weight weight = is_copied ? copy_weight(data, count, copy) : Weight{data, 4 * kPanel, 64, 64 * kPanel};
    for (int64_t row = rows.begin; row < rows.end; row += kBlock) {
      const int64_t row_count = rows.end - row < kBlock ? rows.end - row : kBlock;
      int32_t* block = sums + (row - rows.begin) * kBlock;
      const int32_t* start = chunk == 0 ? columns.start + offset : block;
      multiply_block<kOut, kBias>(args, args.a + row * args.a_stride + 64 * step, row_count, weight, count, start,
                                  chunk == 0 ? 0 : kBlock * 4, block, pending);
      if (chunk == chunks - 1) pending = {block, &columns, row, offset, 0, row_count};
    }
  }
}

template <DType kOut, bool kBias>
SQ_AMX void gemm_range(const GemmArgs& args, Range rows, Range panels) {
  static const TileConfig config;
  alignas(64) int32_t sums[kMaxRows * kBlock];
  PanelColumns columns[2];  // the pending block may belong to the panel before
  Pending pending{};
  _tile_loadconfig(&config);
  for (int64_t row = rows.begin; row < rows.end; row += kMaxRows) {
    const int64_t end = row + kMaxRows < rows.end ? row + kMaxRows : rows.end;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      PanelColumns& here = columns[panel & 1];
      // With one panel after itself, in the next rows, its columns are those that a pending block still needs.
      load_columns(args, panel, &here);
      for (int64_t offset = 0; offset < here.count; offset += kBlock) {
        multiply_columns<kOut, kBias>(args, {row, end}, here, offset, sums, pending);
      }
    }
  }
  finish_rows<kOut, kBias>(args, pending, kBlock);
  _tile_release();
}

}  // namespace

void gemm_int8_amx(const GemmArgs& args, Range rows, Range panels) {
  if (rows.end - rows.begin < kFewestRows || args.k == 0) return gemm_int8_avx512vnni(args, rows, panels);
  SQ_DISPATCH_OUTPUT(gemm_range, args, rows, panels);
}

}  // namespace sq

#endif
