// The experts' products without tensor cores, for few rows an expert and for sizes that tensor cores do not take.
#pragma once

#include "cuda/kernels/grouped.cuh"
#include "cuda/kernels/skinny.cuh"

namespace sq {

// Grid: kRows rows and kColumns columns of each layer a block; threads: skinny_threads(k); wide: can_move_words of all
// layers.
template <typename Sum, int kRows, int kColumns>
__global__ void __launch_bounds__(32 * kSkinnyWarps, skinny_blocks_together<Sum>(kRows))
    grouped_skinny_kernel(GroupedJob job, uint32_t column_tiles, bool wide) {
  GroupedWork work;
  if (!find_work(job, blockIdx.x, column_tiles, kColumns, work)) return;
  skinny_tile<Sum, kRows, kColumns>(work.job, work.rows, 0, work.column, wide);
}

}  // namespace sq
