// Products with the tile registers of AMX. For INT8, tdpbusd multiplies 16 rows x 64 values of the activation by 64 values x
// 16 columns of the weight; for FP8, widened to bf16, tdpbf16ps multiplies 16 x 32 by 32 x 16. A tile is 1 KB either way. A
// block is 32 rows x 32 columns: 4 tiles of sums, 2 of activation, 2 of weight; a step is one tile of k.
//
//   for 32 columns: for depth chunk: copy the weight's chunk; for 32 rows: for step: 4 tile loads, 4 products
//
// The copied chunk stays in L1 while rows pass from L2. In the packed weight itself, 32 of a panel's 64 columns lie in every
// other 128 bytes, so that they would compete for half of the cache sets. The last step of a block (scales, bias, cast) is
// spread over the tile instructions of the next one.
#include "fp8_bf16.h"

#if SQ_X86

#define SQ_AMX_FEATURES SQ_BF16_FEATURES ",amx-tile,amx-int8,amx-bf16"
#define SQ_AMX __attribute__((target(SQ_AMX_FEATURES)))
#define SQ_AMX_INLINE inline __attribute__((always_inline, target(SQ_AMX_FEATURES)))

namespace sq {
namespace {

constexpr int64_t kBlock = 32;          // rows and columns of a block
constexpr int64_t kMaxRows = 512;       // whose sums wait for the next chunk: 64 KB
constexpr int64_t kMaxSteps = 9;        // in a chunk: 18 KB of weight
constexpr int64_t kFewestCopied = 192;  // rows for which a copy of the weight pays
constexpr int64_t kFewestRows = 9;      // below, the tiles are so empty that vpdpbusd is faster

struct Int8Product {
  using Sum = int32_t;
  static constexpr int64_t kDepth = 64;        // of a step
  static constexpr float kSmallestSum = 1.0f;  // of those that are not 0
};

struct Fp8Product {
  using Sum = float;
  static constexpr int64_t kDepth = 32;
  static constexpr float kSmallestSum = 0x1p-32f;  // e5m2's smallest value squared; sums are multiples of it
};

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A block whose sums are still to be finished.
template <class Product>
struct Pending {
  const typename Product::Sum* sums;
  const PanelColumns* columns;
  int64_t offset;  // of its columns in the panel
  const float* a_scale;
  int64_t a_scale_step;
  uint8_t* y;
  int64_t y_stride;   // bytes
  int64_t count = 0;  // rows not finished
};

// The hardware's conversion to bf16 needs half of the instructions of store_sums. It flushes subnormals to zero, so that
// it is for rows whose values are either 0 or above 2^-126: where the smallest product is at least kSmallestValue, which
// PanelColumns::smallest demands of the bias too, a sum of both is a multiple of 2^-23 of that.
constexpr float kSmallestValue = 0x1p-100f;

template <bool kBias, class Sum>
SQ_AMX_INLINE void store_sums_bf16(const Sum* sums, float a_scale, const float* scale, const float* bias, uint32_t mask,
                                   void* y) {
  const __m512 low = scale_sums<kBias>(sums, a_scale, scale, bias);
  const __m512 high = scale_sums<kBias>(sums + 16, a_scale, scale + 16, bias + 16);
  _mm512_mask_storeu_epi16(y, mask, (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// Finishes the next `count` rows of the block. What the loop uses is in local variables, because the compiler has to assume
// that a store to y changes everything else.
template <DType kOut, bool kBias, class Product>
SQ_AMX_INLINE void finish_rows(Pending<Product>& block, int64_t count) {
  if (block.count == 0) return;
  Pending<Product> rest = block;
  const PanelColumns& columns = *rest.columns;
  const float *scale = columns.scale + rest.offset, *bias = columns.bias + rest.offset;
  const auto mask = static_cast<uint32_t>(columns.mask >> rest.offset);
  const float smallest = columns.smallest * Product::kSmallestSum;
  for (int64_t left = count < rest.count ? count : rest.count; left > 0; --left) {
    const float a_scale = *rest.a_scale;
    if (kOut == DType::kBFloat16 && a_scale * smallest >= kSmallestValue) {
      store_sums_bf16<kBias>(rest.sums, a_scale, scale, bias, mask, rest.y);
    } else {
      store_sums<kOut, kBias>(rest.sums, a_scale, columns, rest.offset, rest.y);
    }
    rest.sums += kBlock;
    rest.a_scale += rest.a_scale_step;
    rest.y += rest.y_stride;
    --rest.count;
  }
  block = rest;
}

// 32 columns of the weight, a depth chunk of them: where they are and how.
struct Weight {
  const uint8_t* data;
  int64_t row_bytes;     // from one row of a tile to the next
  int64_t second_bytes;  // from the first 16 columns to the second
  int64_t step_bytes;
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

// As copy_weight, from fp8 to bf16: a tile row is 16 columns x 2 k, so that a group of 4 k becomes two rows.
SQ_AMX_INLINE Weight decode_weight(const Bf16Table& table, const uint8_t* b, int64_t steps, uint8_t* copy) {
  for (int64_t part = 0; part < steps * 16; ++part) {
    const int64_t group = part / 2;
    uint8_t* target = copy + group / 8 * 2 * kTileBytes + part % 2 * kTileBytes + group % 8 * 128;
    const WeightPairs pairs = decode_weight_pairs(table, b + group * 4 * kPanel + part % 2 * 64);
    _mm512_store_si512(target, pairs.first);
    _mm512_store_si512(target + 64, pairs.second);
  }
  return {copy, 64, kTileBytes, 2 * kTileBytes};
}

#define SQ_MULTIPLY_TILES(sums, a, b)                       \
  do {                                                      \
    if constexpr (Product::kDepth == Int8Product::kDepth) { \
      _tile_dpbusd(sums, a, b);                             \
    } else {                                                \
      _tile_dpbf16ps(sums, a, b);                           \
    }                                                       \
  } while (false)

// sums[32][32] = start + the products of up to 32 rows of a with `steps` tiles of k. The rows of `start` are start_bytes
// apart: 0 where all begin with the same values.
template <DType kOut, bool kBias, class Product>
SQ_AMX_INLINE void multiply_block(const uint8_t* a, int64_t a_stride, int64_t count, Weight b, int64_t steps,
                                  const void* start, int64_t start_bytes, typename Product::Sum* sums,
                                  Pending<Product>& before) {
  const int64_t rows_per_step = div_up(kBlock, steps);
  const uint8_t* a1 = a + 16 * a_stride;
  const auto* start0 = static_cast<const uint8_t*>(start);
  const uint8_t* start1 = start0 + 16 * start_bytes;
  _tile_loadd(0, start0, start_bytes);
  _tile_loadd(1, start0 + 64, start_bytes);
  if (count > 16) {
    _tile_loadd(2, start1, start_bytes);
    _tile_loadd(3, start1 + 64, start_bytes);
    for (int64_t step = 0; step < steps; ++step) {
      _tile_loadd(4, a + 64 * step, a_stride);
      _tile_loadd(6, b.data, b.row_bytes);
      _tile_loadd(7, b.data + b.second_bytes, b.row_bytes);
      SQ_MULTIPLY_TILES(0, 4, 6);
      _tile_loadd(5, a1 + 64 * step, a_stride);
      SQ_MULTIPLY_TILES(1, 4, 7);
      SQ_MULTIPLY_TILES(2, 5, 6);
      SQ_MULTIPLY_TILES(3, 5, 7);
      b.data += b.step_bytes;
      finish_rows<kOut, kBias>(before, rows_per_step);
    }
    finish_rows<kOut, kBias>(before, kBlock);
    _tile_stored(2, sums + 16 * kBlock, kBlock * 4);
    _tile_stored(3, sums + 16 * kBlock + 16, kBlock * 4);
  } else {
    for (int64_t step = 0; step < steps; ++step) {
      _tile_loadd(4, a + 64 * step, a_stride);
      _tile_loadd(6, b.data, b.row_bytes);
      _tile_loadd(7, b.data + b.second_bytes, b.row_bytes);
      SQ_MULTIPLY_TILES(0, 4, 6);
      SQ_MULTIPLY_TILES(1, 4, 7);
      b.data += b.step_bytes;
      finish_rows<kOut, kBias>(before, rows_per_step);
    }
    finish_rows<kOut, kBias>(before, kBlock);
  }
  _tile_stored(0, sums, kBlock * 4);
  _tile_stored(1, sums + 16, kBlock * 4);
}

// Fetches a weight that is used next into L2, a little with every block of rows: read in one go when its turn comes, it
// would be waited for line by line. A group of 4 k of 32 columns is two cache lines.
class Prefetch {
 public:
  Prefetch(const uint8_t* data, int64_t groups, int64_t blocks)
      : data_(data), left_(data == nullptr ? 0 : groups), share_(div_up(groups, blocks)) {}

  void advance() {
    for (int64_t end = left_ > share_ ? left_ - share_ : 0; left_ > end; --left_) {
      _mm_prefetch(reinterpret_cast<const char*>(data_), _MM_HINT_T1);
      _mm_prefetch(reinterpret_cast<const char*>(data_ + 64), _MM_HINT_T1);
      data_ += 4 * kPanel;
    }
  }

 private:
  const uint8_t* data_;
  int64_t left_, share_;
};

// 32 columns of y, from `offset` columns into the panel on, for up to kMaxRows rows. `next` is the weight of the columns
// that come afterwards, or null.
template <DType kOut, bool kBias, class Product>
SQ_AMX void multiply_columns(const GemmArgs& args, Range rows, const PanelColumns& columns, int64_t offset,
                             const uint8_t* next, typename Product::Sum* sums, Pending<Product>& pending) {
  constexpr bool kIsInt8 = Product::kDepth == Int8Product::kDepth;
  alignas(64) uint8_t copy[kMaxSteps * 2 * kTileBytes];
  const uint8_t* b = args.b + columns.first / kPanel * panel_bytes(args.k) + 4 * offset;
  const int64_t steps = padded_k(args.k) / Product::kDepth;
  const bool is_copied = !kIsInt8 || rows.end - rows.begin >= kFewestCopied;
  const int64_t y_stride = args.n * (kOut == DType::kFloat32 ? 4 : 2);
  const int64_t chunks = is_copied ? div_up(steps, kMaxSteps) : 1;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t step = chunk * steps / chunks;
    const int64_t count = (chunk + 1) * steps / chunks - step;
    const uint8_t* data = b + step * Product::kDepth * kPanel;
    Weight weight{data, 4 * kPanel, 64, 64 * kPanel};
    if constexpr (!kIsInt8) {
      weight = decode_weight(bf16_table(args.b_dtype), data, count, copy);
    } else if (is_copied) {
      weight = copy_weight(data, count, copy);
    }
    const uint8_t* following = chunk + 1 < chunks ? data + count * Product::kDepth * kPanel : next;
    Prefetch prefetch(following, div_up(steps, chunks) * Product::kDepth / 4, div_up(rows.end - rows.begin, kBlock));
    for (int64_t row = rows.begin; row < rows.end; row += kBlock) {
      prefetch.advance();
      const int64_t row_count = rows.end - row < kBlock ? rows.end - row : kBlock;
      auto* block = sums + (row - rows.begin) * kBlock;
      const bool is_first = chunk == 0;
      const void* start = is_first ? static_cast<const void*>(columns.start + offset) : block;
      multiply_block<kOut, kBias>(args.a + row * args.a_stride + 64 * step, args.a_stride, row_count, weight, count,
                                  start, is_first ? 0 : kBlock * 4, block, pending);
      if (chunk == chunks - 1) {
        pending = {block,
                   &columns,
                   offset,
                   args.a_scale + row * args.a_scale_step,
                   args.a_scale_step,
                   output_address<kOut>(args, row, columns.first + offset),
                   y_stride,
                   row_count};
      }
    }
  }
}

template <DType kOut, bool kBias, class Product>
SQ_AMX void gemm_range(const GemmArgs& args, Range rows, Range panels, Product /*kind*/) {
  static constexpr TileConfig kConfig;
  alignas(64) typename Product::Sum sums[kMaxRows * kBlock];
  PanelColumns columns[2];  // the pending block may belong to the panel before
  Pending<Product> pending{};
  _tile_loadconfig(&kConfig);
  for (int64_t row = rows.begin; row < rows.end; row += kMaxRows) {
    const int64_t end = row + kMaxRows < rows.end ? row + kMaxRows : rows.end;
    for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
      PanelColumns& here = columns[panel & 1];
      load_columns(args, panel, &here);
      const uint8_t* weight = args.b + panel * panel_bytes(args.k);
      const uint8_t* next_panel = panel + 1 < panels.end ? weight + panel_bytes(args.k) : nullptr;
      for (int64_t offset = 0; offset < here.count; offset += kBlock) {
        const uint8_t* next = offset + kBlock < here.count ? weight + 4 * (offset + kBlock) : next_panel;
        multiply_columns<kOut, kBias>(args, {row, end}, here, offset, next, sums, pending);
      }
    }
    finish_rows<kOut, kBias>(pending, kBlock);
  }
  _tile_release();
}

}  // namespace

void gemm_int8_amx(const GemmArgs& args, Range rows, Range panels) {
  if (rows.end - rows.begin < kFewestRows || args.k == 0) return gemm_int8_avx512vnni(args, rows, panels);
  SQ_DISPATCH_OUTPUT(gemm_range, args, rows, panels, Int8Product());
}

void gemm_fp8_amx(const GemmArgs& args, Range rows, Range panels) {
  if (rows.end - rows.begin < kFewestRows || args.k == 0) return gemm_fp8_avx512bf16(args, rows, panels);
  SQ_DISPATCH_OUTPUT(gemm_range, args, rows, panels, Fp8Product());
}

}  // namespace sq

#endif
