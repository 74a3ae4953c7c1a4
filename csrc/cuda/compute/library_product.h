// Products through cuBLASLt: its plan (gemm_plan.h), the library, and the kernels before and after it.
#pragma once

#include "cuda/compute/job.h"

namespace sq {

// is_fast: fp8 products are added with fewer bits. A chunk of rows that the library refuses leaves the others as they are.
Refusal multiply_by_library(ProductJob& job, const Rows& rows, bool is_fast);

}  // namespace sq
