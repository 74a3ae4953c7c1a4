// The experts' products on tensor cores, through mma.sync.
#pragma once

#include "cuda/kernels/grouped.cuh"
#include "cuda/kernels/mma.cuh"

namespace sq {

// Grid: a tile of y of each layer a block; threads and shared memory of Tile.
template <DType kType, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::blocks_together(kType != DType::kInt8))
    grouped_mma_kernel(GroupedJob job, uint32_t column_tiles) {
  if constexpr (!has_mma<kType>()) {
    trap();
  } else {
    GroupedWork work;
    if (!find_work(job, blockIdx.x, column_tiles, Tile::kN, work)) return;
    MmaSums<kType, Tile> sums;
    mma_sums<kType, kType, Tile>(sums, work.job, work.rows, 0, work.column);
    const MatrixPlace own = warp_place<Tile>();
    store_tile(work.job.epilogue, work.rows, own.row, work.column + own.column, sums.at);
  }
}

}  // namespace sq
