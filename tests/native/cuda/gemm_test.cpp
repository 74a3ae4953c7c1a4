// The CUDA products without tensor cores, run on the CPU: INT8 bit for bit against exact sums, FP8 within the rounding of
// fp32 sums; the epilogue and the widening bit for bit.
#include "native/cuda/cuda_shim.h"

// After the shim.
#include <algorithm>
#include <string>
#include <vector>

#include "cuda/kernels/add.cuh"
#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/scales.cuh"
#include "cuda/kernels/skinny.cuh"
#include "cuda/kernels/widen.cuh"
#include "native/cpu/codes.h"

namespace {

using namespace sq;

// Bias and output of any dtype, with the memory that a kernel may touch exactly as large as it says.
struct Output {
  DType dtype;
  Buffer<uint8_t> memory;
  Output(DType dtype, int64_t count) : dtype(dtype), memory(count * element_size(dtype)) {
    for (int64_t i = 0; i < memory.size(); ++i) memory[i] = 0xa5;
  }
  float operator[](int64_t i) const { return load_float(memory.data(), dtype, i); }
};

float cast(float value, DType dtype) {
  float storage = 0;
  store_float(&storage, dtype, 0, value);
  return load_float(&storage, dtype, 0);
}

struct Case {
  int64_t m, n, k;
  DType a_dtype, b_dtype, bias_dtype, y_dtype;
  bool has_bias, a_per_row, b_per_column;
  int64_t offset;  // bytes before a and b, which take their alignment away
  bool has_residual = false;
};

Epilogue epilogue_of(const Case& test, const Buffer<float>& a_scale, const Buffer<float>& b_scale, const Output& bias,
                     const Output& y, const Output& residual) {
  return {test.m,
          test.n,
          a_scale.data(),
          b_scale.data(),
          test.a_per_row ? 1 : 0,
          test.b_per_column ? 1 : 0,
          test.has_bias ? bias.memory.data() : nullptr,
          test.bias_dtype,
          y.memory.data(),
          test.y_dtype,
          test.has_residual ? residual.memory.data() : nullptr};
}

template <typename Sum, int kRows>
void run_skinny(const SkinnyJob& job) {
  const auto column_blocks = static_cast<unsigned>((job.epilogue.n + kSkinnyColumns - 1) / kSkinnyColumns);
  const auto row_blocks = static_cast<unsigned>((job.epilogue.m + kRows - 1) / kRows);
  shim::run_grid(skinny_gemm_kernel<Sum, kRows, kSkinnyColumns>, column_blocks * row_blocks,
                 static_cast<unsigned>(skinny_threads(job.k)), size_t{0}, job, column_blocks,
                 can_move_words(job.a, job.b, job.k));
}

template <typename Sum>
void run_skinny(const SkinnyJob& job) {
  if (job.epilogue.m == 1) return run_skinny<Sum, 1>(job);
  if (job.epilogue.m == 2) return run_skinny<Sum, 2>(job);
  if (job.epilogue.m <= 4) return run_skinny<Sum, 4>(job);
  run_skinny<Sum, kSkinnyRows>(job);
}

Output random_bias(const Case& test) {
  Output bias(test.bias_dtype, test.n);
  for (int64_t i = 0; i < test.n; ++i) store_float(bias.memory.data(), test.bias_dtype, i, random_float() * 3);
  return bias;
}

Output random_residual(const Case& test) {
  Output residual(test.y_dtype, test.has_residual ? test.m * test.n : 0);
  for (int64_t i = 0; test.has_residual && i < test.m * test.n; ++i) {
    store_float(residual.memory.data(), test.y_dtype, i, random_float() * 3);
  }
  return residual;
}

// What the contract says of an exact sum.
float finished(const Case& test, const Buffer<float>& a_scale, const Buffer<float>& b_scale, const Output& bias,
               const Output& residual, int64_t row, int64_t column, float sum) {
  float value = sum * (a_scale[test.a_per_row ? row : 0] * b_scale[test.b_per_column ? column : 0]);
  if (test.has_bias) value += bias[column];
  const float y = cast(value, test.y_dtype);
  return test.has_residual ? cast(y + residual[row * test.n + column], test.y_dtype) : y;
}

void test_skinny(const Case& test) {
  const bool is_int8 = test.a_dtype == DType::kInt8;
  const Buffer<uint8_t> a = random_codes(test.m * test.k + test.offset, test.a_dtype);
  const Buffer<uint8_t> b = random_codes(test.n * test.k + test.offset, test.b_dtype);
  const Buffer<float> a_scale = random_scales(test.a_per_row ? test.m : 1);
  const Buffer<float> b_scale = random_scales(test.b_per_column ? test.n : 1);
  const Output bias = random_bias(test), y(test.y_dtype, test.m * test.n), residual = random_residual(test);
  const SkinnyJob job{a.data() + test.offset,
                      b.data() + test.offset,
                      test.a_dtype,
                      test.b_dtype,
                      test.k,
                      epilogue_of(test, a_scale, b_scale, bias, y, residual)};
  is_int8 ? run_skinny<int32_t>(job) : run_skinny<float>(job);
  for (int64_t row = 0; row < test.m; ++row) {
    for (int64_t column = 0; column < test.n; ++column) {
      double sum = 0, magnitude = 0;
      for (int64_t i = 0; i < test.k; ++i) {
        const double product = static_cast<double>(decode(job.a[row * test.k + i], test.a_dtype)) *
                               decode(job.b[column * test.k + i], test.b_dtype);
        sum += product;
        magnitude += std::fabs(product);
      }
      const float got = y[row * test.n + column];
      const float expected = finished(test, a_scale, b_scale, bias, residual, row, column, static_cast<float>(sum));
      if (is_int8) {
        CHECK(same(got, expected), "m %" PRId64 " n %" PRId64 " k %" PRId64 " [%" PRId64 ", %" PRId64 "]: %g, not %g",
              test.m, test.n, test.k, row, column, got, expected);
        continue;
      }
      // K additions, each wrong by half an ulp of a partial sum at most; then 4 single roundings.
      const double scale =
          static_cast<double>(a_scale[test.a_per_row ? row : 0]) * b_scale[test.b_per_column ? column : 0];
      const double offset = test.has_bias ? bias[column] : 0.0;
      const double exact = sum * scale + offset;
      double bound = (static_cast<double>(test.k) + 3) * 0x1p-23 * (magnitude * scale + std::fabs(offset));
      bound += (test.y_dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-24) * (std::fabs(exact) + bound) + 1e-30;
      CHECK(std::fabs(got - exact) <= bound, "k %" PRId64 " [%" PRId64 ", %" PRId64 "]: %g, expected %g", test.k, row,
            column, got, exact);
    }
  }
}

void test_largest_sum() {
  constexpr int64_t kMost = 131071;
  const Case test{3, 2, kMost, DType::kInt8, DType::kInt8, DType::kFloat32, DType::kFloat32, false, false, false, 0};
  const Buffer<uint8_t> a(test.m * kMost), b(test.n * kMost);
  for (int64_t i = 0; i < a.size(); ++i) a[i] = static_cast<uint8_t>(-128);
  for (int64_t i = 0; i < b.size(); ++i) b[i] = i < kMost ? static_cast<uint8_t>(-128) : 127;
  Buffer<float> one(1);
  one[0] = 1.0f;
  const Output none(DType::kFloat32, 0), y(DType::kFloat32, test.m * test.n);
  run_skinny<int32_t>(
      {a.data(), b.data(), test.a_dtype, test.b_dtype, kMost, epilogue_of(test, one, one, none, y, none)});
  for (int64_t i = 0; i < y.memory.size() / 4; ++i) {
    const float expected = static_cast<float>((i % 2 == 0 ? 128 : -127) * 128 * kMost);
    CHECK(y[i] == expected, "%g, expected %g", y[i], expected);
  }
}

// A NaN or infinity of fp8 reaches its row and column, and no other.
void test_special_values(DType dtype) {
  const Case test{5, 6, 40, dtype, dtype, DType::kFloat32, DType::kFloat32, false, false, false, 0};
  const Buffer<uint8_t> a = random_codes(test.m * test.k, dtype), b = random_codes(test.n * test.k, dtype);
  a[3 * test.k + 39] = dtype == DType::kFloat8E4M3 ? 0xff : 0x7c;
  b[4 * test.k] = 0x7f;
  const Buffer<float> one = random_scales(1);
  const Output none(DType::kFloat32, 0), y(DType::kFloat32, test.m * test.n);
  run_skinny<float>({a.data(), b.data(), dtype, dtype, test.k, epilogue_of(test, one, one, none, y, none)});
  for (int64_t i = 0; i < test.m * test.n; ++i) {
    const bool is_hit = i / test.n == 3 || i % test.n == 4;
    CHECK(std::isfinite(y[i]) == !is_hit, "[%" PRId64 ", %" PRId64 "]: %g", i / test.n, i % test.n, y[i]);
  }
}

template <typename Sum, typename Y>
void run_epilogue(const Buffer<Sum>& sums, int splits, const Epilogue& epilogue, bool wide) {
  const auto row_blocks = static_cast<unsigned>(epilogue_blocks(epilogue.n));
  shim::run_grid(epilogue_kernel<Sum, Y>, static_cast<unsigned>(epilogue.m) * row_blocks, unsigned{kEpilogueThreads},
                 size_t{0}, const_cast<const Sum*>(sums.data()), splits, epilogue, row_blocks, wide);
}

template <typename Sum>
void test_epilogue(const Case& test, int splits) {
  const int64_t count = test.m * test.n;
  Buffer<Sum> sums(count * splits);
  for (int64_t i = 0; i < sums.size(); ++i) {
    const int bits = random_int(INT32_MIN / splits, INT32_MAX / splits);
    sums[i] = std::is_same_v<Sum, int32_t> ? static_cast<Sum>(bits) : static_cast<Sum>(random_float() * 1e6f);
  }
  const Buffer<float> a_scale = random_scales(test.a_per_row ? test.m : 1);
  const Buffer<float> b_scale = random_scales(test.b_per_column ? test.n : 1);
  const Output bias = random_bias(test), y(test.y_dtype, test.m * test.n), residual = random_residual(test);
  const Epilogue epilogue = epilogue_of(test, a_scale, b_scale, bias, y, residual);
  const bool wide = test.n % kEpilogueColumns == 0;
  switch (test.y_dtype) {
    case DType::kBFloat16:
      run_epilogue<Sum, BFloat16>(sums, splits, epilogue, wide);
      break;
    case DType::kFloat16:
      run_epilogue<Sum, Float16>(sums, splits, epilogue, wide);
      break;
    default:
      run_epilogue<Sum, float>(sums, splits, epilogue, wide);
  }
  for (int64_t i = 0; i < count; ++i) {
    Sum sum = sums[i];
    for (int split = 1; split < splits; ++split) sum += sums[split * count + i];
    const float expected =
        finished(test, a_scale, b_scale, bias, residual, i / test.n, i % test.n, static_cast<float>(sum));
    CHECK(same(y[i], expected), "epilogue, n %" PRId64 ", %" PRId64 ": %g, expected %g", test.n, i, y[i], expected);
  }
}

void test_widen(DType dtype, int64_t count, int64_t offset) {
  const Buffer<uint8_t> q(count + offset);
  const Buffer<BFloat16> wide(count + offset);
  for (int64_t i = 0; i < q.size(); ++i) q[i] = static_cast<uint8_t>(i);
  shim::run_grid(widen_kernel, 2u, 64u, size_t{0}, const_cast<const uint8_t*>(q.data() + offset), dtype,
                 wide.data() + offset, count, offset == 0);
  for (int64_t i = offset; i < q.size(); ++i) {
    const float expected = decode(q[i], dtype);
    CHECK(same(to_float(wide[i]), expected), "code %d: %g, expected %g", q[i], to_float(wide[i]), expected);
  }
}

// Products of fp8 values are exact in fp32, so that a fused multiply-add and two instructions have the same bits; also for
// NaN, infinities, zeros and sums near the largest.
void test_fused_sums(DType a_dtype, DType b_dtype) {
  for (int pair = 0; pair < 1 << 16; ++pair) {
    const auto a = static_cast<uint8_t>(pair), b = static_cast<uint8_t>(pair >> 8);
    const float x = decode(a, a_dtype), y = decode(b, b_dtype);
    const float sums[] = {0.0f, -0.0f, random_float(), -x * y, random_float() * 1e9f, 3.4e38f, 1e-45f, INFINITY, NAN};
    for (float sum : sums) {
      const float product = x * y, separate = sum + product;
      CHECK(same(__fmaf_rn(x, y, sum), separate), "%d * %d + %g", a, b, sum);
    }
  }
}

void test_scales(int a_step, int b_step, int64_t m, int64_t n) {
  const Buffer<float> a = random_scales(a_step == 0 ? 1 : m), b = random_scales(b_step == 0 ? 1 : n);
  const Buffer<float> a_vector(m), b_vector(n);
  const ScalesJob job{a.data(), b.data(), a_step, b_step, m, n, a_vector.data(), b_vector.data()};
  shim::run_grid(align_scales_kernel, 2u, unsigned{kScalesThreads}, size_t{0}, job);
  for (int64_t i = 0; i < m; ++i) CHECK(same(a_vector[i], a[i * a_step]), "a %" PRId64, i);
  for (int64_t i = 0; i < n; ++i) CHECK(same(b_vector[i], b[i * b_step]), "b %" PRId64, i);
}

template <typename T>
void test_add(int64_t count, int64_t offset) {
  const Buffer<T> y = random_values<T>(count + offset), residual = random_values<T>(count + offset);
  std::vector<float> expected;
  for (int64_t i = 0; i < y.size(); ++i) {
    expected.push_back(i < offset ? to_float(y[i]) : rounded<T>(to_float(y[i]) + to_float(residual[i])));
  }
  shim::run_grid(add_kernel<T>, 2u, 64u, size_t{0}, y.data() + offset, const_cast<const T*>(residual.data() + offset),
                 count, offset == 0);
  for (int64_t i = 0; i < y.size(); ++i) {
    CHECK(same(to_float(y[i]), expected[i]), "add %" PRId64 ": %g, expected %g", i, to_float(y[i]), expected[i]);
  }
}

static_assert(skinny_threads(0) == 32 && skinny_threads(512) == 32 && skinny_threads(513) == 64);
static_assert(skinny_threads(4096) == 256 && skinny_threads(100000) == 256);
static_assert(skinny_blocks(1, 1) == 1 && skinny_blocks(9, 5) == 4 && epilogue_blocks(1025) == 2);

}  // namespace

int main() {
  constexpr DType kFloats[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  constexpr DType kPairs[][2] = {{DType::kInt8, DType::kInt8},
                                 {DType::kFloat8E4M3, DType::kFloat8E4M3},
                                 {DType::kFloat8E4M3, DType::kFloat8E5M2},
                                 {DType::kFloat8E5M2, DType::kFloat8E4M3},
                                 {DType::kFloat8E5M2, DType::kFloat8E5M2}};
  int turn = 0;
  for (const auto& pair : kPairs) {
    for (int64_t m : {1, 2, 3, 4, 5, 8, 9, 17}) {
      for (int64_t n : {1, 3, 4, 9, 33}) {
        for (int64_t k : {0, 1, 15, 16, 48, 577, 2048, 4112}) {
          if (k > 600 && n > 9) continue;
          ++turn;
          // Products of fp8 values overflow fp16.
          const DType y_dtype = kFloats[turn / 3 % (pair[0] == DType::kInt8 ? 3 : 2)];
          test_skinny({m, n, k, pair[0], pair[1], kFloats[turn % 3], y_dtype, turn % 2 == 0, turn % 4 < 2, turn % 8 < 4,
                       turn % 5 == 0 ? 1 : 0, turn % 3 == 1 && pair[0] == DType::kInt8});
        }
      }
    }
  }
  test_largest_sum();
  test_special_values(DType::kFloat8E4M3);
  test_special_values(DType::kFloat8E5M2);
  for (DType y_dtype : kFloats) {
    for (DType bias_dtype : kFloats) {
      for (int64_t n : {1, 4, 7, 1023, 1024, 1028}) {
        ++turn;
        const Case test{3, n,           0, {}, {}, bias_dtype, y_dtype, turn % 3 != 0, turn % 2 == 0, turn % 4 < 2,
                        0, turn % 5 < 3};
        test_epilogue<int32_t>(test, 1 + turn % 3);
        test_epilogue<float>(test, 1 + turn % 3);
      }
    }
  }
  for (int steps = 0; steps < 4; ++steps) {
    for (int64_t m : {0, 1, 255, 1500}) test_scales(steps % 2, steps / 2, m, 513);
  }
  for (DType dtype : {DType::kFloat8E4M3, DType::kFloat8E5M2}) {
    for (DType other : {DType::kFloat8E4M3, DType::kFloat8E5M2}) test_fused_sums(dtype, other);
    for (int64_t count : {1, 8, 256, 3001}) {
      test_widen(dtype, count, 0);
      test_widen(dtype, count, 3);
    }
  }
  for (int64_t count : {1, 8, 256, 3001}) {
    for (int64_t offset : {0, 3}) {
      test_add<float>(count, offset);
      test_add<BFloat16>(count, offset);
      test_add<Float16>(count, offset);
    }
  }
}
