// What the CUDA ops ask of a device, and which kernels were validated on which.
#pragma once

#include <cstdint>

#include "cuda/kernels/code_arch.h"

namespace sq {

// Kernels that are validated together; their names are those of smoothquant_ext/validated_kernels.json.
enum class Family { kQuantize, kNormActivation, kGemmInt8, kGemmFp8, kGemmMma, kGemmWgmma, kExpertsInt8, kExpertsFp8 };

// Compute capability, 90 for 9.0.
int device_arch(int device);

// The code of this library that the device runs.
CodeArch device_code(int device);

int multiprocessors(int device);

// Shared memory that a block may ask for, in bytes, less what kernels have of fixed size.
int64_t shared_bytes(int device);

// Fails with a sentence unless the kernels were validated on a GPU of this architecture, or the user wants them anyway.
void require_validated(const char* op, Family family, int device);

}  // namespace sq
