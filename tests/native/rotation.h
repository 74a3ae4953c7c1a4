// The rotation of blocks as the ops define it, written out plainly.
#pragma once

#include <cmath>
#include <cstdint>

namespace sq {

// v[0, count), in place: for h = 1, 2, 4, ... block / 2 the pairs (a, b) of values h apart become (a + b, a - b), then all
// are multiplied by 1 / sqrt(block). 0: nothing.
inline void rotate_plainly(float* v, int64_t count, int64_t block) {
  if (block == 0) return;
  for (int64_t h = 1; h < block; h *= 2) {
    for (int64_t i = 0; i < count; ++i) {
      if ((i & h) != 0) continue;
      const float a = v[i], b = v[i + h];
      v[i] = a + b;
      v[i + h] = a - b;
    }
  }
  const float factor = static_cast<float>(1 / std::sqrt(static_cast<double>(block)));
  for (int64_t i = 0; i < count; ++i) v[i] *= factor;
}

}  // namespace sq
