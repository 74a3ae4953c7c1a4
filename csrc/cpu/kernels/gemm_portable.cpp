// INT8 product for any CPU: plain loops, for compilers to vectorize.
#include "cpu/kernels/epilogue.h"
#include "cpu/kernels/gemm.h"

namespace sq {

namespace {

void gemm_int8_portable(const GemmArgs& args, Range rows, Range panels) {
  constexpr int64_t kRows = 32;   // sums kept for this many rows at a time: 8 KB
  constexpr int64_t kDepth = 64;  // values of k widened at a time: 8 KB
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const auto* packed = reinterpret_cast<const int8_t*>(args.b + panel * panel_bytes(args.k));
    const ColumnScales columns(args, panel);
    for (int64_t first = rows.begin; first < rows.end; first += kRows) {
      const int64_t count = rows.end - first < kRows ? rows.end - first : kRows;
      int32_t sums[kRows][kPanel] = {};
      for (int64_t k0 = 0; k0 < args.k; k0 += kDepth) {
        // The panel has padded_k(K) rows, those beyond K zero, and so the k of a chunk are always kDepth.
        int16_t b[kDepth][kPanel];
        for (int64_t k = 0; k < kDepth; ++k) {
          const int8_t* source = packed + (k0 + k) / 4 * 4 * kPanel + k % 4;
          for (int64_t n = 0; n < kPanel; ++n) b[k][n] = source[4 * n];
        }
        for (int64_t r = 0; r < count; ++r) {
          const uint8_t* a = args.a + (first + r) * args.a_stride + k0;
          for (int64_t k = 0; k < kDepth; ++k) {
            const auto value = static_cast<int16_t>(a[k] - kOffset);
            // At most 128 * 128, which 16 bits hold.
            for (int64_t n = 0; n < kPanel; ++n) sums[r][n] += static_cast<int16_t>(value * b[k][n]);
          }
        }
      }
      for (int64_t r = 0; r < count; ++r) store_row(args, columns, first + r, sums[r]);
    }
  }
}

}  // namespace

constexpr GemmKernels kInt8Portable = {"portable", gemm_int8_portable, /*block_bytes=*/1 << 17, nullptr,
                                       /*element_size=*/1};

}  // namespace sq
