// What both tensor-core products are tested with: shapes, operands, the exact result and how far from it FP8 may be.
#pragma once

#include <vector>

#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/tile_gemm.h"
#include "cuda/kernels/with_type.h"
#include "native/cpu/codes.h"

namespace sq {

struct TileCase {
  int64_t m, n, k;
  DType a_dtype, b_dtype, bias_dtype, y_dtype;
  bool has_bias, a_per_row, b_per_column;
};

inline void store_value(void* x, DType dtype, int64_t index, float value) {
  if (dtype == DType::kBFloat16) return from_float(value, static_cast<BFloat16*>(x) + index);
  if (dtype == DType::kFloat16) return from_float(value, static_cast<Float16*>(x) + index);
  static_cast<float*>(x)[index] = value;
}

inline float cast_value(float value, DType dtype) {
  float storage = 0;
  store_value(&storage, dtype, 0, value);
  return load_float(&storage, dtype, 0);
}

// K roundings of fp32 sums, whatever their order, and four of single operations; then the cast.
inline double fp8_bound(const TileCase& test, double exact, double magnitude) {
  const double sums = (static_cast<double>(test.k) + 4) * 0x1p-23 * magnitude;
  return sums + (test.y_dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-24) * (std::fabs(exact) + sums) + 1e-30;
}

template <typename Run>
void test_tile_case(const TileCase& test, const Run& run) {
  const Buffer<uint8_t> a = random_codes(test.m * test.k, test.a_dtype),
                        b = random_codes(test.n * test.k, test.b_dtype);
  const Buffer<float> a_scale = random_scales(test.a_per_row ? test.m : 1);
  const Buffer<float> b_scale = random_scales(test.b_per_column ? test.n : 1);
  const Buffer<uint8_t> bias(test.n * element_size(test.bias_dtype));
  for (int64_t i = 0; i < test.n; ++i) store_value(bias.data(), test.bias_dtype, i, random_float() * 3);
  const Buffer<uint8_t> y(test.m * test.n * element_size(test.y_dtype));
  for (int64_t i = 0; i < y.size(); ++i) y[i] = 0xa5;
  const Epilogue epilogue{test.m,
                          test.n,
                          a_scale.data(),
                          b_scale.data(),
                          test.a_per_row ? 1 : 0,
                          test.b_per_column ? 1 : 0,
                          test.has_bias ? bias.data() : nullptr,
                          test.bias_dtype,
                          y.data(),
                          test.y_dtype,
                          nullptr};
  const TileJob job{a.data(), b.data(), test.a_dtype, test.b_dtype, test.k, epilogue};
  with_operand_types(test.a_dtype, test.b_dtype, [&](auto a_type, auto b_type) { run(a_type, b_type, job); });

  for (int64_t row = 0; row < test.m; ++row) {
    for (int64_t column = 0; column < test.n; ++column) {
      double sum = 0, magnitude = 0;
      for (int64_t i = 0; i < test.k; ++i) {
        const double product =
            double{decode(a[row * test.k + i], test.a_dtype)} * decode(b[column * test.k + i], test.b_dtype);
        sum += product;
        magnitude += std::fabs(product);
      }
      const float own_a = a_scale[test.a_per_row ? row : 0], own_b = b_scale[test.b_per_column ? column : 0];
      const float own_bias = test.has_bias ? load_float(bias.data(), test.bias_dtype, column) : 0.0f;
      const float got = load_float(y.data(), test.y_dtype, row * test.n + column);
      if (test.a_dtype == DType::kInt8) {
        const float scaled = static_cast<float>(sum) * (own_a * own_b);
        const float expected = cast_value(test.has_bias ? scaled + own_bias : scaled, test.y_dtype);
        CHECK(same(got, expected), "m %" PRId64 " n %" PRId64 " k %" PRId64 " [%" PRId64 ", %" PRId64 "]: %g, not %g",
              test.m, test.n, test.k, row, column, got, expected);
        continue;
      }
      const double scale = static_cast<double>(own_a) * own_b, exact = sum * scale + own_bias;
      const double bound = fp8_bound(test, exact, magnitude * scale + std::fabs(own_bias));
      CHECK(std::fabs(got - exact) <= bound,
            "m %" PRId64 " n %" PRId64 " k %" PRId64 " [%" PRId64 ", %" PRId64 "]: %g, not %g", test.m, test.n, test.k,
            row, column, got, exact);
    }
  }
}

// A NaN or infinity of fp8 reaches its row and column, and no other.
template <typename Run>
void test_tile_specials(DType dtype, const Run& run) {
  const int64_t m = 5, n = 6, k = 48;
  const Buffer<uint8_t> a = random_codes(m * k, dtype), b = random_codes(n * k, dtype);
  a[3 * k + 39] = dtype == DType::kFloat8E4M3 ? 0xff : 0x7c;
  b[4 * k] = 0x7f;
  const Buffer<float> one = random_scales(1), y(m * n);
  const TileJob job{
      a.data(), b.data(), dtype,
      dtype,    k,        {m, n, one.data(), one.data(), 0, 0, nullptr, DType::kFloat32, y.data(), DType::kFloat32}};
  with_operand_types(dtype, dtype, [&](auto a_type, auto b_type) { run(a_type, b_type, job); });
  for (int64_t i = 0; i < m * n; ++i) {
    const bool is_hit = i / n == 3 || i % n == 4;
    CHECK(std::isfinite(y[i]) == !is_hit, "[%" PRId64 ", %" PRId64 "]: %g", i / n, i % n, y[i]);
  }
}

// run(DTypeConstant of a, of b, TileJob) computes a product.
template <typename Run>
void test_tile_gemm(const Run& run) {
  constexpr DType kFloats[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  constexpr DType kInt8 = DType::kInt8, kE4M3 = DType::kFloat8E4M3, kE5M2 = DType::kFloat8E5M2;
  constexpr DType kPairs[][2] = {{kInt8, kInt8}, {kE4M3, kE4M3}, {kE4M3, kE5M2}, {kE5M2, kE4M3}, {kE5M2, kE5M2}};
  // One row, one tile of k; odd sizes; one more and one less than a tile; more tiles of k than stages, and some twice
  // around; more tiles of y than one.
  constexpr int64_t kShapes[][3] = {{1, 1, 16},     {1, 128, 64},    {8, 7, 32},      {33, 65, 80},   {64, 16, 128},
                                    {127, 129, 48}, {128, 128, 192}, {129, 127, 208}, {17, 40, 1040}, {130, 272, 272}};
  int turn = 0;
  for (const auto& pair : kPairs) {
    for (const auto& shape : kShapes) {
      ++turn;
      if (pair[0] != kInt8 && turn % 2 == 0) continue;
      // Products of fp8 values overflow fp16.
      const DType y_dtype = kFloats[turn / 2 % (pair[0] == kInt8 ? 3 : 2)];
      test_tile_case({shape[0], shape[1], shape[2], pair[0], pair[1], kFloats[turn % 3], y_dtype, turn % 4 != 0,
                      turn % 3 != 0, turn % 5 != 0},
                     run);
    }
  }
  test_tile_specials(kE4M3, run);
  test_tile_specials(kE5M2, run);
}

}  // namespace sq
