// Scales as cuBLASLt wants them with its outer scales: a vector of one for each row and column, from 16 bytes on. One scale
// for all is repeated, a vector that begins elsewhere is copied; both operands in one launch. Bytes moved: 8 a row or column.
#pragma once

#include "cuda/kernels/gemm.h"
#include "cuda/kernels/round.cuh"

namespace sq {

constexpr int kScalesThreads = 256;

// Any grid of blocks of kScalesThreads.
__global__ void __launch_bounds__(kScalesThreads) align_scales_kernel(ScalesJob job) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kScalesThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kScalesThreads;
  for (int64_t i = first; i < job.m; i += step) job.a_vector[i] = job.a[i * job.a_step];
  for (int64_t i = first; i < job.n; i += step) job.b_vector[i] = job.b[i * job.b_step];
}

}  // namespace sq
