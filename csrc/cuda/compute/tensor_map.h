// Descriptions of matrices for TMA, made by the driver on the host.
#pragma once

#include <cstdint>

#include "cuda/kernels/tensor_map.h"

namespace sq {

// Of data [rows, k], bytes, contiguous and 16-byte aligned, k a multiple of 16: boxes of `box_rows` rows and 128
// bytes of k, swizzled, with zeros outside of the matrix. Does not touch the device; remembered, as the driver takes about a
// microsecond to make one.
TensorMap map_of_rows(const char* op, const uint8_t* data, int64_t rows, int64_t k, int box_rows);

}  // namespace sq
