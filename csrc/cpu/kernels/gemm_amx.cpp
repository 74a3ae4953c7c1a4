// Products with the tile registers of AMX: INT8 with tdpbusd, FP8, widened to bf16, with tdpbf16ps. A block is 32 rows x 32
// columns: 4 tiles of sums, 2 of activation, 2 of weight; a step is one tile of k.
//
//   for block of rows: for depth chunk: for 32 columns: for 32 rows: for step: 4 tile loads, 4 products
//
// The rows' chunk stays in L2, and the sums of a block in their tiles: adding them up in memory for shorter chunks, which L1
// would hold, costs more than L1 gains. Everything else is spread over the steps, because tile instructions leave most of
// the core idle: the last step (scales, bias, cast) of the block before, fetching a weight that comes later from memory,
// and for FP8 decoding the next one.
#include <algorithm>

#include "cpu/kernels/amx.h"
#include "cpu/kernels/scratch.h"

#if SQ_X86

namespace sq {
namespace {

// Chosen on Emerald Rapids (2 MB of L2), November 2026.
constexpr int64_t kBlock = 32;           // rows and columns of a block
constexpr int64_t kMostSteps = 64;       // of a depth chunk: 4 KB of a row
constexpr int64_t kRowsBytes = 1 << 20;  // of a chunk of the rows, which leaves L2 room for two chunks of the weight
constexpr int64_t kFewSteps = 4;         // of one for up to 32 rows of FP8: what is decoded stays in L1
constexpr int64_t kSumColumns = 2048;    // whose sums wait for the next depth chunk
constexpr int64_t kRowsPerStep = 4;      // that are finished
constexpr int64_t kFewestInt8Rows = 5;   // below, the tiles are so empty that others are faster
constexpr int64_t kFewestFp8Rows = 4;

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

// A block whose sums are still to be finished, from row `next` on.
template <class Product>
struct Pending {
  const typename Product::Sum* sums;
  const PanelColumns* columns;
  int64_t offset;  // of its columns in the panel
  const float* a_scale;
  int64_t a_scale_step;
  uint8_t* y;
  int64_t y_stride;  // bytes
  int64_t count;     // rows
  int64_t next;
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

// Finishes up to kCount more rows of the block.
template <DType kOut, bool kBias, int64_t kCount, class Product>
SQ_AMX_INLINE void finish_rows(Pending<Product>& block) {
  int64_t row = block.next;
  if (row == block.count) return;
  // In local variables, because the compiler has to assume that a store to y changes everything else.
  const Pending<Product> here = block;
  const PanelColumns& columns = *here.columns;
  const float *scale = columns.scale + here.offset, *bias = columns.bias + here.offset;
  const auto mask = static_cast<uint32_t>(columns.mask >> here.offset);
  const float smallest = columns.smallest * Product::kSmallestSum;
  for (const int64_t end = std::min(row + kCount, here.count); row < end; ++row) {
    const float a_scale = here.a_scale[row * here.a_scale_step];
    const auto* sums = here.sums + row * kBlock;
    uint8_t* y = here.y + row * here.y_stride;
    if (kOut == DType::kBFloat16 && a_scale * smallest >= kSmallestValue) {
      store_sums_bf16<kBias>(sums, a_scale, scale, bias, mask, y);
    } else {
      store_sums<kOut, kBias>(sums, a_scale, columns, here.offset, y);
    }
  }
  block.next = row;
}

// 32 columns of the weight, a depth chunk of them: where its tiles are.
struct Weight {
  const uint8_t* data;
  int64_t row_bytes;     // from one row of a tile to the next
  int64_t second_bytes;  // from the first 16 columns to the second
  int64_t step_bytes;
};

// A group of 4 k of 32 columns in the packed weight is two cache lines, and the next one is kGroupBytes away.
constexpr int64_t kGroupBytes = 4 * kPanel;

// Fetches a part of the weight that is used later into L2, a little with every step: read in one go when its turn comes, it
// would be waited for line by line. Of the lines in order: only then the hardware helps.
class Prefetch {
 public:
  Prefetch(const uint8_t* data, int64_t lines, int64_t steps)
      : data_(data), left_(lines), share_(div_up(lines, steps)) {}

  SQ_AMX_INLINE void advance() {
    for (int64_t end = std::max<int64_t>(0, left_ - share_); left_ > end; --left_) {
      _mm_prefetch(reinterpret_cast<const char*>(data_), _MM_HINT_T1);
      data_ += kLine;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const uint8_t* data_;
  int64_t left_, share_;
};

// Decodes a weight from fp8 to bf16 tiles, the two of a step side by side. A tile row is 16 columns x 2 k, so that a group
// of 4 k becomes two rows of either tile.
class Decode {
 public:
  Decode(const Bf16Table& table, const uint8_t* data, int64_t groups, int64_t steps, uint8_t* tiles)
      : table_(table), data_(data), tiles_(tiles), left_(groups), share_(div_up(groups, steps)) {}

  SQ_AMX_INLINE void advance() { decode(share_); }
  SQ_AMX_INLINE void finish() { decode(left_); }

 private:
  SQ_AMX_INLINE void decode(int64_t count) {
    for (int64_t end = std::max<int64_t>(0, left_ - count); left_ > end; --left_) {
      for (int64_t part = 0; part < 2; ++part) {
        const WeightPairs pairs = decode_weight_pairs(table_, data_ + part * 64);
        _mm512_store_si512(tiles_ + part * kTileBytes, pairs.first);
        _mm512_store_si512(tiles_ + part * kTileBytes + 64, pairs.second);
      }
      data_ += kGroupBytes;
      tiles_ += ++done_ % kGroupsPerTile == 0 ? kTileBytes + 128 : 128;
    }
  }

  static constexpr int64_t kGroupsPerTile = 8;
  const Bf16Table& table_;
  const uint8_t* data_;
  uint8_t* tiles_;
  int64_t left_, share_, done_ = 0;
};

#define SQ_MULTIPLY_TILES(sums, a, b)                       \
  do {                                                      \
    if constexpr (Product::kDepth == Int8Product::kDepth) { \
      _tile_dpbusd(sums, a, b);                             \
    } else {                                                \
      _tile_dpbf16ps(sums, a, b);                           \
    }                                                       \
  } while (false)

// sums[32][32] = start + the products of up to 32 rows of a with `steps` tiles of k. The rows of `start` are 0
// apart where all begin with the same values. `meanwhile` is called with every step.
template <class Product, class Meanwhile>
SQ_AMX_INLINE void multiply_block(Strided<const uint8_t> a_rows, int64_t count, Weight b, int64_t steps,
                                  Strided<const uint8_t> start, typename Product::Sum* sums,
                                  const Meanwhile& meanwhile) {
  const auto [a, a_stride] = a_rows;
  const auto [start0, start_bytes] = start;
  const uint8_t* a1 = a + kTileRows * a_stride;
  const uint8_t* start1 = start0 + kTileRows * start_bytes;
  _tile_loadd(0, start0, start_bytes);
  _tile_loadd(1, start0 + 64, start_bytes);
  if (count > kTileRows) {
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
      meanwhile();
    }
    _tile_stored(2, sums + kTileRows * kBlock, kBlock * 4);
    _tile_stored(3, sums + kTileRows * kBlock + 16, kBlock * 4);
  } else {
    for (int64_t step = 0; step < steps; ++step) {
      _tile_loadd(4, a + 64 * step, a_stride);
      _tile_loadd(6, b.data, b.row_bytes);
      _tile_loadd(7, b.data + b.second_bytes, b.row_bytes);
      SQ_MULTIPLY_TILES(0, 4, 6);
      SQ_MULTIPLY_TILES(1, 4, 7);
      b.data += b.step_bytes;
      meanwhile();
    }
  }
  _tile_stored(0, sums, kBlock * 4);
  _tile_stored(1, sums + 16, kBlock * 4);
}

// The order in which a call visits the weight for one block of rows: depth chunks of a group of columns, then the next
// group. A place is 32 columns of a chunk.
class Walk {
 public:
  Walk(const GemmArgs& args, Range panels, int64_t step_depth, int64_t most_steps, int64_t sum_columns)
      : args_(args),
        first_(panels.begin * kPanel),
        last_(std::min(args.n, panels.end * kPanel)),
        step_depth_(step_depth),
        steps_(padded_k(args.k) / step_depth),
        chunks_(div_up(steps_, most_steps)),
        group_columns_(chunks_ == 1 ? last_ - first_ : std::min(sum_columns, last_ - first_)) {}

  struct Place {
    int64_t group, chunk, column;  // the first columns of the group and of the place
  };

  int64_t chunks() const { return chunks_; }
  int64_t group_columns() const { return group_columns_; }
  Place begin() const { return {first_, 0, first_}; }
  bool is_end(Place place) const { return place.group >= last_; }
  int64_t first_step(int64_t chunk) const { return chunk * steps_ / chunks_; }
  int64_t steps(Place place) const { return first_step(place.chunk + 1) - first_step(place.chunk); }
  int64_t most_steps() const { return div_up(steps_, chunks_); }

  Place after(Place place) const {
    const int64_t group_end = std::min(last_, place.group + group_columns_);
    place.column += kBlock;
    if (place.column < group_end) return place;
    if (++place.chunk < chunks_) return {place.group, place.chunk, place.group};
    return {group_end, 0, group_end};
  }

  // The first place in the panel after the one of this place.
  Place after_panel(Place place) const {
    return after({place.group, place.chunk, place.column / kPanel * kPanel + kPanel - kBlock});
  }

  // Its part of the packed weight, or null at the end.
  const uint8_t* weight(Place place) const {
    if (is_end(place)) return nullptr;
    return args_.b + place.column / kPanel * panel_bytes(args_.k) + 4 * (place.column % kPanel) +
           first_step(place.chunk) * step_depth_ * kPanel;
  }

 private:
  const GemmArgs& args_;
  int64_t first_, last_, step_depth_, steps_, chunks_, group_columns_;
};

template <DType kOut, bool kBias, class Product>
class RowsTimesPanels {
 public:
  using Sum = typename Product::Sum;
  static constexpr bool kIsInt8 = Product::kDepth == Int8Product::kDepth;

  SQ_AMX RowsTimesPanels(const GemmArgs& args, int64_t rows, Range panels)
      : args_(args),
        walk_(args, panels, Product::kDepth, !kIsInt8 && rows <= kBlock ? kFewSteps : kMostSteps,
              rows <= kBlock ? kPanel : kSumColumns),
        table_(bf16_table(args.b_dtype)) {}

  // Rows of which a chunk stays in L2.
  int64_t block_rows(int64_t rows) const {
    const int64_t most = std::max<int64_t>(2, kRowsBytes / (walk_.most_steps() * 64 * kBlock)) * kBlock;
    return padded_rows(div_up(rows, div_up(rows, most)));
  }

  SQ_AMX void run(Range rows) {
    const int64_t blocks = div_up(rows.end - rows.begin, kBlock);
    const int64_t sum_blocks = walk_.chunks() == 1 ? 2 : blocks * div_up(walk_.group_columns(), kBlock);
    const int64_t tiles_bytes = kIsInt8 ? 0 : walk_.most_steps() * 2 * kTileBytes;
    Plan plan;
    const auto sums_part = plan.add<Sum>(sum_blocks * kBlock * kBlock);
    const auto tiles_part = plan.add(tiles_bytes), next_part = plan.add(tiles_bytes);
    Scratch scratch(plan.bytes());
    sums_ = sums_part.in(scratch);
    uint8_t *tiles = tiles_part.in(scratch), *next_tiles = next_part.in(scratch);

    Walk::Place place = walk_.begin();
    if constexpr (!kIsInt8) decoder(place, 1, tiles).finish();
    while (!walk_.is_end(place)) {
      const Walk::Place next = walk_.after(place);
      multiply_columns(rows, place, next, tiles, next_tiles);
      std::swap(tiles, next_tiles);
      place = next;
    }
    finish_rows<kOut, kBias, kBlock>(pending_);
  }

 private:
  // Of a place, within so many steps.
  Decode decoder(Walk::Place place, int64_t steps, uint8_t* tiles) const {
    const int64_t groups = walk_.is_end(place) ? 0 : walk_.steps(place) * Product::kDepth / 4;
    return {table_, walk_.weight(place), groups, steps, tiles};
  }

  // Of the half of the next panel that corresponds to the place.
  Prefetch prefetcher(Walk::Place place, int64_t steps) const {
    const Walk::Place panel = walk_.after_panel(place);
    if (walk_.is_end(panel)) return {nullptr, 0, steps};
    const int64_t half = walk_.steps(panel) * Product::kDepth * kPanel / 2;
    return {walk_.weight(panel) + place.column % kPanel / kBlock * half, half / 64, steps};
  }

  // All rows times the 32 columns and the depth chunk of a place.
  SQ_AMX void multiply_columns(Range rows, Walk::Place place, Walk::Place next, const uint8_t* tiles,
                               uint8_t* next_tiles) {
    PanelColumns& columns = columns_[place.column / kPanel & 1];  // the pending block may belong to the panel before
    const int64_t offset = place.column % kPanel;
    if (offset == 0) load_columns(args_, place.column / kPanel, &columns);
    const int64_t steps = walk_.steps(place);
    const int64_t blocks = div_up(rows.end - rows.begin, kBlock);
    Prefetch prefetch = prefetcher(place, blocks * steps);
    Decode decode = decoder(next, blocks * steps, next_tiles);
    const auto meanwhile = [&]() __attribute__((always_inline, target(SQ_AMX_FEATURES))) {
      prefetch.advance();
      if constexpr (!kIsInt8) decode.advance();
      finish_rows<kOut, kBias, kRowsPerStep>(pending_);
    };
    Weight weight{walk_.weight(place), kGroupBytes, 64, 16 * kGroupBytes};
    if constexpr (!kIsInt8) weight = {tiles, 64, kTileBytes, 2 * kTileBytes};
    const bool is_first = place.chunk == 0, is_last = place.chunk + 1 == walk_.chunks();
    finish_stores();
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t row = rows.begin + block * kBlock, count = std::min(kBlock, rows.end - row);
      Sum* sums = sums_of(place, block, blocks);
      const Strided<const uint8_t> a = {args_.a + row * args_.a_stride + 64 * walk_.first_step(place.chunk),
                                        args_.a_stride};
      const void* start = is_first ? static_cast<const void*>(columns.start + offset) : sums;
      multiply_block<Product>(a, count, weight, steps, {static_cast<const uint8_t*>(start), is_first ? 0 : kBlock * 4},
                              sums, meanwhile);
      finish_rows<kOut, kBias, kBlock>(pending_);
      if (is_last) {
        pending_ = {sums,
                    &columns,
                    offset,
                    args_.a_scale + row * args_.a_scale_step,
                    args_.a_scale_step,
                    output_address<kOut>(args_, row, place.column),
                    args_.n * (kOut == DType::kFloat32 ? 4 : 2),
                    count,
                    0};
      }
    }
    if constexpr (!kIsInt8) decode.finish();
  }

  Sum* sums_of(Walk::Place place, int64_t block, int64_t blocks) {
    const int64_t index = walk_.chunks() == 1 ? turn_++ % 2 : (place.column - place.group) / kBlock * blocks + block;
    return sums_ + index * kBlock * kBlock;
  }

  const GemmArgs& args_;
  Walk walk_;
  const Bf16Table& table_;
  PanelColumns columns_[2];
  Pending<Product> pending_{};
  Sum* sums_ = nullptr;
  int64_t turn_ = 0;  // of the two blocks of sums
};

template <DType kOut, bool kBias, class Product>
SQ_AMX void gemm_range(const GemmArgs& args, Range rows, Range panels, Product /*kind*/) {
  const Tiles tiles;
  RowsTimesPanels<kOut, kBias, Product> product(args, rows.end - rows.begin, panels);
  const int64_t block = product.block_rows(rows.end - rows.begin);
  for (int64_t row = rows.begin; row < rows.end; row += block) product.run({row, std::min(rows.end, row + block)});
}

void gemm_int8_amx(const GemmArgs& args, Range rows, Range panels) {
  if (rows.end - rows.begin < kFewestInt8Rows || args.k == 0) return kInt8Avx512Vnni.run(args, rows, panels);
  SQ_DISPATCH_OUTPUT(gemm_range, args, rows, panels, Int8Product());
}

void gemm_fp8_amx(const GemmArgs& args, Range rows, Range panels) {
  if (args.m < kFewestFp8Rows || args.k == 0) return kFp8Avx512Bf16.run(args, rows, panels);
  SQ_DISPATCH_OUTPUT(gemm_range, args, rows, panels, Fp8Product());
}

}  // namespace

// These cut blocks that fit themselves.
constexpr GemmKernels kInt8Amx = {"amx", gemm_int8_amx, /*block_bytes=*/1 << 24, nullptr, /*element_size=*/1};
constexpr GemmKernels kFp8Amx = {"amx", gemm_fp8_amx, /*block_bytes=*/1 << 24, widen_bf16_avx512, /*element_size=*/2};

}  // namespace sq

#endif
