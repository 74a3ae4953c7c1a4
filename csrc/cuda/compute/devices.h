// What the CUDA ops ask of a device.
#pragma once

#include <cstdint>
#include <string>

#include "cuda/kernels/code_arch.h"

namespace sq {

constexpr int kDeviceCount = 64;  // that are told apart

// The architectures that this library has code for, as they were asked for when it was built.
std::string cuda_archs();

// Compute capability, 90 for 9.0.
int device_arch(int device);

// The code of this library that the device runs.
CodeArch device_code(int device);

int multiprocessors(int device);

// Shared memory that a block may ask for, in bytes, less what kernels have of fixed size.
int64_t shared_bytes(int device);

int64_t l2_bytes(int device);

}  // namespace sq
