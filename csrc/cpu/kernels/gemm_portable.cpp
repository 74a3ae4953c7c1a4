// INT8 product for any CPU.
#include "epilogue.h"
#include "gemm.h"

namespace sq {

void gemm_int8_portable(const GemmArgs& args, Range rows, Range panels) {
  const int64_t rows4 = padded_k(args.k) / 4;
  const int64_t used4 = div_up(args.k, 4);
  for (int64_t p = panels.begin; p < panels.end; ++p) {
    const auto* panel = reinterpret_cast<const int8_t*>(args.b + p * panel_bytes(args.k));
    const auto* column_sums = reinterpret_cast<const int32_t*>(panel + rows4 * 4 * kPanel);
    const int64_t columns = args.n - p * kPanel < kPanel ? args.n - p * kPanel : kPanel;
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      const uint8_t* a = args.a + row * args.a_stride;
      uint32_t sums[kPanel];
      for (int64_t n = 0; n < kPanel; ++n) sums[n] = 0u - 128u * static_cast<uint32_t>(column_sums[n]);
      for (int64_t k4 = 0; k4 < used4; ++k4) {
        const int8_t* b = panel + k4 * 4 * kPanel;
        const int16_t a0 = a[4 * k4], a1 = a[4 * k4 + 1], a2 = a[4 * k4 + 2], a3 = a[4 * k4 + 3];
        for (int64_t n = 0; n < kPanel; ++n) {
          const int32_t dot = a0 * b[4 * n] + a1 * b[4 * n + 1] + a2 * b[4 * n + 2] + a3 * b[4 * n + 3];
          sums[n] += static_cast<uint32_t>(dot);
        }
      }
      float values[kPanel];
      for (int64_t n = 0; n < kPanel; ++n) values[n] = static_cast<float>(static_cast<int32_t>(sums[n]));
      store_row(args, row, p * kPanel, columns, values);
    }
  }
}

}  // namespace sq
