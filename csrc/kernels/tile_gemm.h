// Launches of our own tensor-core products, as gemm.h; which of them can take a product, gemm_config.h says.
#pragma once

#include "kernels/gemm.h"
#include "kernels/tensor_map.h"

namespace sq {

struct TileJob {
  const uint8_t *a, *b;    // [m, k] and [n, k], contiguous, 16-byte aligned
  DType a_dtype, b_dtype;  // both int8, or either fp8
  int64_t k;               // a multiple of 16
  Finish finish;
};

void launch_mma_gemm(const TileJob& job, void* stream);
// The maps are of a and b, in boxes of WgmmaTile's rows and bytes.
void launch_wgmma_gemm(const TileJob& job, const TensorMap& a_map, const TensorMap& b_map, int multiprocessors,
                       void* stream);

}  // namespace sq
