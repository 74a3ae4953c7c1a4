// Products by torch's own operators, which Python calls: sq::_gemm_by_torch.
#pragma once

#include "cuda/compute/job.h"

namespace sq {

// Of any shape.
Refusal multiply_by_torch(ProductJob& job, const Rows& rows);

}  // namespace sq
