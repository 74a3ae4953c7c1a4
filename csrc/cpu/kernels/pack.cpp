#include "cpu/kernels/pack.h"

#include <cstring>

namespace sq {

void pack_panels(const uint8_t* b, int64_t n, int64_t k, DType dtype, uint8_t* packed, Range panels) {
  const int64_t rows4 = padded_k(k) / 4;
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    uint8_t* panel = packed + p * panel_bytes(k);
    std::memset(panel, 0, panel_bytes(k));
    const int64_t columns = n - p * kPanel < kPanel ? n - p * kPanel : kPanel;
    int32_t sums[kPanel] = {};
    for (int64_t c = 0; c < columns; ++c) {
      const uint8_t* source = b + (p * kPanel + c) * k;
      uint8_t* target = panel + 4 * c;
      int64_t k4 = 0;
      for (; 4 * k4 + 4 <= k; ++k4) std::memcpy(target + k4 * 4 * kPanel, source + 4 * k4, 4);
      std::memcpy(target + k4 * 4 * kPanel, source + 4 * k4, k - 4 * k4);
      // The sum of a column fits: 131071 * 128 < 2^31.
      for (int64_t i = 0; i < k; ++i) sums[c] += static_cast<int8_t>(source[i]);
    }
    if (dtype == DType::kInt8) std::memcpy(panel + rows4 * 4 * kPanel, sums, sizeof sums);
  }
}

void copy_rows(const uint8_t* source, int64_t k, uint8_t flip, uint8_t* target, int64_t target_stride, Range rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const uint8_t* __restrict from = source + row * k;
    uint8_t* __restrict to = target + row * target_stride;
    for (int64_t i = 0; i < k; ++i) to[i] = from[i] ^ flip;
  }
}

}  // namespace sq
