// FP8 product for any CPU: both operands are decoded to fp32 through a table of 256 values.
#include "cpu/kernels/epilogue.h"
#include "cpu/kernels/gemm.h"

namespace sq {
namespace {

struct DecodeTable {
  float values[256];

  explicit DecodeTable(float (*decode)(uint8_t)) {
    for (int i = 0; i < 256; ++i) values[i] = decode(static_cast<uint8_t>(i));
  }
};

const float* decode_table(DType dtype) {
  static const DecodeTable e4m3(float8_e4m3_to_float);
  static const DecodeTable e5m2(float8_e5m2_to_float);
  return dtype == DType::kFloat8E5M2 ? e5m2.values : e4m3.values;
}

}  // namespace

void widen_fp32_portable(const WidenArgs& args, Range rows) {
  const float* table = decode_table(args.dtype);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const uint8_t* q = args.q + row * args.q_stride;
    auto* wide = reinterpret_cast<float*>(args.wide + row * args.wide_stride);
    for (int64_t k = 0; k < args.k; ++k) wide[k] = table[q[k]];
    for (int64_t k = args.k; k < padded_k(args.k); ++k) wide[k] = 0.0f;
  }
}

namespace {

void gemm_fp8_portable(const GemmArgs& args, Range rows, Range panels) {
  constexpr int64_t kRows = 32;   // sums kept for this many rows at a time: 8 KB
  constexpr int64_t kDepth = 64;  // values of k decoded at a time: 16 KB
  const float* table = decode_table(args.b_dtype);
  for (int64_t panel = panels.begin; panel < panels.end; ++panel) {
    const uint8_t* packed = args.b + panel * panel_bytes(args.k);
    const ColumnScales columns(args, panel);
    for (int64_t first = rows.begin; first < rows.end; first += kRows) {
      const int64_t count = rows.end - first < kRows ? rows.end - first : kRows;
      float sums[kRows][kPanel] = {};
      for (int64_t k0 = 0; k0 < args.k; k0 += kDepth) {
        const int64_t depth = args.k - k0 < kDepth ? args.k - k0 : kDepth;
        float b[kDepth][kPanel];
        for (int64_t k = 0; k < depth; ++k) {
          const uint8_t* source = packed + (k0 + k) / 4 * 4 * kPanel + (k0 + k) % 4;
          for (int64_t n = 0; n < kPanel; ++n) b[k][n] = table[source[4 * n]];
        }
        for (int64_t r = 0; r < count; ++r) {
          const auto* a = reinterpret_cast<const float*>(args.a + (first + r) * args.a_stride) + k0;
          for (int64_t k = 0; k < depth; ++k) {
            for (int64_t n = 0; n < kPanel; ++n) sums[r][n] += a[k] * b[k][n];
          }
        }
      }
      for (int64_t r = 0; r < count; ++r) store_row(args, columns, first + r, sums[r]);
    }
  }
}

}  // namespace

constexpr GemmKernels kFp8Portable = {"portable", gemm_fp8_portable, /*block_bytes=*/1 << 17, widen_fp32_portable,
                                      /*element_size=*/4};

}  // namespace sq
