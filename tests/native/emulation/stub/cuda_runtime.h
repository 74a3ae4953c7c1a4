// In the place of CUDA's own, for compiling csrc/cuda as plain C++: see ../emulate.h.
#pragma once

#include <cstdint>

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
