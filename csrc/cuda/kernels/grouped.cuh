// The products of all experts of a mixture in one launch, see GroupedJob: the tiles of skinny.cuh and of mma.cuh over rows
// that route.cuh sorted by expert.
//
// How many rows an expert has is known on the device only. So the grid has a block for each tile that there could be: with
// tiles of m rows, for at most slots / m + E of them, or one a slot if that is less (first_row_tile). A block finds its rows
// and its expert in the table of tiles, and ends if there are none.
// Bytes moved: the weights of each expert that has rows once for every m of them, rows of a for every tile of columns
// through L2; y.
#pragma once

#include "cuda/kernels/experts.h"
#include "cuda/kernels/gemm.h"
#include "cuda/kernels/row_map.cuh"

namespace sq {

// Rows of y are slots, and several of them may share one of a.
struct SlotRows {
  const int32_t* slots;
  int slots_per_row;
  SQ_HOST_DEVICE int64_t input(int64_t row) const { return slots[row] / slots_per_row; }
  SQ_HOST_DEVICE int64_t output(int64_t row) const { return slots[row]; }
};

// What a block has to do.
struct GroupedWork {
  SkinnyJob job;  // with the expert's layer, and as many rows as the tile has
  SlotRows rows;
  int64_t column;  // of y, where the tile begins
};

// column_tiles: of one layer. Returns false if there is nothing to do.
SQ_HOST_DEVICE inline bool find_work(const GroupedJob& job, uint32_t block, uint32_t column_tiles, int tile_columns,
                                     GroupedWork& work) {
  const TilePlace place = tile_place<uint32_t>(block, static_cast<uint32_t>(job.tile_count),
                                               column_tiles * static_cast<uint32_t>(job.layer_count));
  const RowTile tile = job.tiles[place.row];
  if (tile.rows == 0) return false;
  const bool is_second = place.column >= column_tiles;
  const GroupedLayer& layer = is_second ? job.layers[1] : job.layers[0];
  work.column = (is_second ? place.column - column_tiles : place.column) * tile_columns;
  work.rows = {job.order + tile.first, job.slots_per_row};
  const int64_t row = tile.expert * job.n;  // of all experts' layers
  const int64_t bias_bytes = layer.bias_dtype == DType::kFloat32 ? 4 : 2;
  work.job.a = job.a;
  work.job.b = layer.b + row * job.k;
  work.job.a_dtype = work.job.b_dtype = job.dtype;
  work.job.k = job.k;
  Epilogue& epilogue = work.job.epilogue;
  epilogue.m = tile.rows;
  epilogue.n = job.n;
  epilogue.a_scale = job.a_scale;
  epilogue.a_scale_step = 1;
  epilogue.b_scale = layer.b_scale + (layer.b_scale_step == 0 ? tile.expert : row);
  epilogue.b_scale_step = layer.b_scale_step;
  epilogue.bias = layer.bias == nullptr ? nullptr : static_cast<const uint8_t*>(layer.bias) + row * bias_bytes;
  epilogue.bias_dtype = layer.bias_dtype;
  epilogue.y = layer.y;
  epilogue.y_dtype = job.y_dtype;
  epilogue.residual = nullptr;
  return true;
}

}  // namespace sq
