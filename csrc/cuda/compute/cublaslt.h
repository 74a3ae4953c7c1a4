// Matrix products through cuBLASLt, which torch has loaded already.
#pragma once

#include "cuda/compute/gemm_plan.h"
#include "cuda/compute/launch.h"

namespace sq {

struct LtOperands {
  const void *a, *b;               // as in LtProduct
  const float *a_scale, *b_scale;  // with outer scales: one for each row and each column of D
  const void* bias;                // one for each row of D, of its type
  void* d;
};

// D = op(A)^T B on the current stream of the device of `like`; false if cuBLASLt has no algorithm for it.
bool lt_multiply(const char* op, const LtProduct& product, const LtOperands& operands, const Tensor& like);

}  // namespace sq
