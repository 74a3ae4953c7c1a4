// A mixture of experts as its op calls it: its tensors are checked and contiguous.
#pragma once

#include "common/experts_checks.h"
#include "common/norm_activation_checks.h"
#include "cuda/compute/launch.h"

namespace sq {

struct ExpertsInputs {
  const Tensor &x, &index, &weights;  // [..., K], [..., top k] twice
  LayerLists layers;
  ExpertsShapes shapes;
  Activation activation;
  const Rotations& rotate;  // of x and of what down reads
};

// y [..., N]
Tensor run_experts(const char* op, const ExpertsInputs& inputs);

}  // namespace sq
