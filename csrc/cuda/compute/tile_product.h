// Products on our own tensor-core kernels, which run only where SMOOTHQUANT_CUDA_GEMM asks for them.
#pragma once

#include <optional>

#include "cuda/compute/launch.h"
#include "cuda/kernels/gemm_config.h"
#include "cuda/kernels/tile_gemm.h"

namespace sq {

// Values of SMOOTHQUANT_CUDA_GEMM: nothing or "library" (cuBLASLt and the kernel for few rows), "mma", "wgmma", or "auto" for
// whichever has the smallest estimate.
struct GemmRequest {
  const char* name;
  bool is_own;
  std::optional<GemmFamily> family;  // none: auto
};

// Read anew at every call, so that tests and benchmarks can go through them. Fails for any other value.
GemmRequest requested_gemm(const char* op);

// Fails with a sentence if what was asked for cannot compute this, or was not validated. `like` has the device.
void multiply_tiles(const char* op, const GemmRequest& request, const TileJob& job, const Tensor& like);

}  // namespace sq
