// What TMA needs to know of a matrix in global memory: the driver's CUtensorMap, without its header.
#pragma once

#include <cstdint>

namespace sq {

struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

}  // namespace sq
