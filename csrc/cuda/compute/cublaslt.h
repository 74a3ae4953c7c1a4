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

// D = op(A)^T B on the current stream of the device of `like`; false if cuBLASLt cannot compute it.
bool lt_multiply(const char* op, const LtProduct& product, const LtOperands& operands, const Tensor& like);

// Makes what the first product on a device would make, which is not allowed while a graph is captured.
void lt_warm_up(const char* op, int device);

}  // namespace sq
