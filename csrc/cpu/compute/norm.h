// What the kernels of norms are given.
#pragma once

#include "common/tensors.h"
#include "cpu/kernels/epilogue.h"

namespace sq {

// A norm's weight or bias in fp32, an offset added.
inline void widen_channels(const Tensor& values, double offset, float* target) {
  const Tensor contiguous = as_contiguous(values);
  widen(contiguous.const_data_ptr(), kernel_dtype(contiguous.scalar_type()), static_cast<float>(offset),
        contiguous.numel(), target);
}

}  // namespace sq
