// Launches of what w8a8_experts consists of besides quantization and activation, as gemm.h. A slot is one of the top_k
// experts of a token: slot s is of token s / top_k.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/kernels/gemm.h"
#include "cuda/kernels/tile_maps.h"

namespace sq {

// Rows of one expert that one block multiplies, by their places in the order of experts; no rows: nothing to do.
struct RowTile {
  int32_t expert, first, rows;
};

// Where the row tiles of expert `expert` begin, if so many slots are of experts before it. Every expert has room for its
// own, since this grows from one to the next by at least the tiles of its slots, and nobody has to add up the tiles of
// all experts before. The smaller term is the first one where most experts have no slots.
SQ_HOST_DEVICE constexpr int64_t first_row_tile(int64_t slots_before, int64_t expert, int tile_rows) {
  const int64_t tiles = slots_before / tile_rows + expert;
  return slots_before < tiles ? slots_before : tiles;
}

struct RouteJob {
  const int64_t* index;  // [slots]: an expert, or `experts` for none
  int64_t slots;         // at most 2^31 - 1
  int experts, tile_rows;
  int32_t* order;      // [slots]: slots sorted by their expert, each expert's in sequence, those without one left out
  RowTile* tiles;      // [tile_count]
  int64_t tile_count;  // first_row_tile(slots, experts, tile_rows)
};

// The layers of all experts: b [experts, n, k].
struct GroupedLayer {
  const uint8_t* b;
  const float* b_scale;  // [experts, n], or [experts] if the step is 0
  int b_scale_step;
  const void* bias;  // [experts, n], or null
  DType bias_dtype;  // fp32, bf16 or fp16
  void* y;           // [slots, n]
};

// y[s] = cast((a[s / slots_per_row] @ b[expert of s].T) * (a_scale[s / slots_per_row] * b_scale[expert]) + bias[expert]) for
// every slot s with an expert, of one or two layers.
struct GroupedJob {
  const uint8_t* a;      // [slots / slots_per_row, k], contiguous
  const float* a_scale;  // [slots / slots_per_row]
  DType dtype;           // of a and b
  int slots_per_row;
  int64_t n, k;
  DType y_dtype;
  const int32_t* order;  // as RouteJob makes them
  const RowTile* tiles;
  int64_t tile_count;
  int layer_count;
  GroupedLayer layers[2];
};

// y[t] = cast(sum over slots s of t, in their order, of weights[s] * x[s]), the sum in fp32. An index that is no expert and
// not `experts` makes its token's row NaN.
struct CombineJob {
  const float* x;  // [tokens * top_k, columns]
  const int64_t* index;
  const void* weights;  // [tokens * top_k]
  DType weights_dtype;  // fp32, bf16 or fp16
  int64_t tokens, columns;
  int top_k, experts;
  void* y;        // [tokens, columns]
  DType y_dtype;  // fp32, bf16 or fp16
};

void launch_route(const RouteJob& job, void* stream);
void launch_combine(const CombineJob& job, void* stream);
// In tiles of 1, 2, 4 or 8 rows, by the kernel without tensor cores.
void launch_grouped_skinny(const GroupedJob& job, int tile_rows, void* stream);
// In tiles of kFewMmaRows or many_mma_rows; a and b begin at multiples of 16 bytes, k is a multiple of 16.
void launch_grouped_mma(const GroupedJob& job, int tile_rows, void* stream);

// Rows of the tiles on tensor cores. With 128 the second sums of fp8 and what a block knows of its expert take more registers
// than there are. A tile may have fewer rows than its kernel computes.
constexpr int kFewMmaRows = 32;
constexpr int many_mma_rows(bool is_fp8) { return is_fp8 ? 64 : 128; }

// Blocks that the launches need.
constexpr int64_t grouped_blocks(int64_t tile_count, int64_t n, int layers, int tile_columns) {
  return tile_count * layers * tiles_of(n, tile_columns);
}
constexpr int kCombineColumns = 2048;  // of a block
constexpr int64_t combine_blocks(int64_t tokens, int64_t columns) {
  return tokens * tiles_of(columns, kCombineColumns);
}

}  // namespace sq
