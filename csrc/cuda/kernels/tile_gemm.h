// Launches of our own tensor-core products, as gemm.h; which of them can take a product, gemm_config.h says.
#pragma once

#include "cuda/kernels/gemm.h"
#include "cuda/kernels/tensor_map.h"

namespace sq {

using TileJob = SkinnyJob;  // whose a and b are 16-byte aligned and whose k is a multiple of 16

// Of WgmmaTile, or swapped of SwapTile.
struct WgmmaJob {
  TileJob product;
  bool is_swapped;
  TensorMap a_map, b_map;  // in boxes of the tile's m and n rows
  int multiprocessors;
  int splits;   // of k; one if not swapped
  void* parts;  // swapped: [splits, m, n], int32 or fp32, which are left to launch_epilogue
};

void launch_mma_gemm(const TileJob& job, void* stream);
void launch_wgmma_gemm(const WgmmaJob& job, void* stream);

}  // namespace sq
