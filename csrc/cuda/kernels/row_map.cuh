// Which rows of a and of y the rows of a product are. A product of all rows takes them as they come; one of some rows of
// larger matrices has a map of its own with the same two functions.
#pragma once

#include <cstdint>

#include "common/dtypes.h"

namespace sq {

struct AllRows {
  SQ_HOST_DEVICE int64_t input(int64_t row) const { return row; }   // of a and its scales
  SQ_HOST_DEVICE int64_t output(int64_t row) const { return row; }  // of y
};

}  // namespace sq
