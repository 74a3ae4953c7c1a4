// Products on our own tensor-core kernels.
#pragma once

#include "cuda/compute/job.h"
#include "cuda/kernels/gemm_config.h"

namespace sq {

// What of a problem is the device's.
TileProblem problem_of_device(int device);

// By whichever kernel of the family has the smallest estimate.
Refusal multiply_by_tiles(ProductJob& job, const Rows& rows, GemmFamily family);

}  // namespace sq
