// The CUDA quantize kernels, run on the CPU, against the formula written out plainly in double where that is exact and
// in single fp32 operations where the contract says so.
#include "native/cuda/cuda_shim.h"

// After the shim.
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/kernels/quantize.cuh"
#include "native/rotation.h"

namespace {

using sq::BFloat16;
using sq::DType;
using sq::Float16;

int failures = 0;

void report(const std::string& what) {
  if (++failures <= 20) std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}

void expect_equal(const char* name, const char* what, int64_t where, int got, int expected) {
  if (got == expected) return;
  report(std::string(name) + " " + what + " " + std::to_string(where) + ": " + std::to_string(got) + ", expected " +
         std::to_string(expected));
}

// --- the plain formula
// ------------------------------------------------------------------------------------------------

// The value of an 8-bit float, from its definition.
double decode_float8(uint8_t code, int mantissa_bits, int bias) {
  const int exponent = (code & 0x7f) >> mantissa_bits;
  const int mantissa = code & ((1 << mantissa_bits) - 1);
  const double unit = std::ldexp(1.0, -mantissa_bits);
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa * unit, 1 - bias) : std::ldexp(1.0 + mantissa * unit, exponent - bias);
  return code & 0x80 ? -magnitude : magnitude;
}

// The nearest code by looking at them all, ties to the even one. `magnitudes` are those of the finite codes.
uint8_t nearest_float8(float value, const std::vector<double>& magnitudes) {
  const double magnitude = std::fabs(static_cast<double>(value));
  double closest = magnitude;
  int best = 0;
  for (int code = 1; code < static_cast<int>(magnitudes.size()); ++code) {
    const double distance = std::fabs(magnitudes[code] - magnitude);
    if (distance > closest) break;  // they ascend
    if (distance < closest || code % 2 == 0) best = code;
    closest = distance;
  }
  return static_cast<uint8_t>(best | (std::signbit(value) ? 0x80 : 0));
}

std::vector<double> finite_magnitudes(int mantissa_bits, int bias, int largest) {
  std::vector<double> magnitudes;
  for (int code = 0; code <= largest; ++code) magnitudes.push_back(decode_float8(code, mantissa_bits, bias));
  return magnitudes;
}

template <DType kQ>
uint8_t plain_round(float value);

template <>
uint8_t plain_round<DType::kInt8>(float value) {
  if (std::isnan(value)) return 0;
  return static_cast<uint8_t>(static_cast<int>(std::nearbyint(std::fmin(std::fmax(value, -127.0f), 127.0f))));
}

template <>
uint8_t plain_round<DType::kFloat8E4M3>(float value) {
  static const std::vector<double> magnitudes = finite_magnitudes(3, 7, 0x7e);
  return std::isnan(value) ? (std::signbit(value) ? 0xff : 0x7f) : nearest_float8(value, magnitudes);
}

template <>
uint8_t plain_round<DType::kFloat8E5M2>(float value) {
  static const std::vector<double> magnitudes = finite_magnitudes(2, 15, 0x7b);
  return std::isnan(value) ? (std::signbit(value) ? 0xff : 0x7f) : nearest_float8(value, magnitudes);
}

template <DType kQ>
constexpr float kQMax = 127.0f;
template <>
constexpr float kQMax<DType::kFloat8E4M3> = 448.0f;
template <>
constexpr float kQMax<DType::kFloat8E5M2> = 57344.0f;

// --- inputs
// -----------------------------------------------------------------------------------------------------------

template <typename T>
T from_float(float value);

template <>
float from_float(float value) {
  return value;
}

template <>
BFloat16 from_float(float value) {
  return {static_cast<uint16_t>(sq::float_bits(value) >> 16)};  // truncation: any bfloat16 will do
}

template <>
Float16 from_float(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  Float16 result;
  std::memcpy(&result.bits, &half, sizeof(half));
  return result;
}

template <typename T>
std::vector<T> random_values(std::mt19937& random, size_t count, float spread) {
  std::normal_distribution<float> normal(0.0f, spread);
  std::vector<T> values(count);
  for (T& value : values) value = from_float<T>(normal(random));
  return values;
}

// --- tests
// ------------------------------------------------------------------------------------------------------------

template <DType kQ>
void test_rounding(const char* name) {
  std::mt19937 random(1);
  // Every fp32 exponent with random mantissas, every tie between neighbouring codes, and the specials.
  std::vector<float> values = {0.0f, -0.0f, INFINITY, -INFINITY, NAN, -NAN, FLT_MAX, FLT_MIN, FLT_TRUE_MIN};
  for (int i = 0; i < 20000; ++i) values.push_back(sq::float_from_bits(random()));
  for (int i = -2 * 127; i <= 2 * 127; ++i) values.push_back(0.5f * static_cast<float>(i));
  for (int mantissa_bits : {2, 3}) {
    const int bias = mantissa_bits == 2 ? 15 : 7;
    for (int code = 0; code < 0x7c; ++code) {
      const double tie = (decode_float8(code, mantissa_bits, bias) + decode_float8(code + 1, mantissa_bits, bias)) / 2;
      for (double factor : {1.0, 1.0 - 1e-7, 1.0 + 1e-7}) {
        values.push_back(static_cast<float>(tie * factor));
        values.push_back(static_cast<float>(-tie * factor));
      }
    }
  }
  for (float value : values) {
    const float capped = std::isnan(value) ? value : std::fmin(std::fmax(value, -kQMax<kQ>), kQMax<kQ>);
    expect_equal(name, "rounding of fp32 bits", sq::float_bits(value), sq::round_to<kQ>(value),
                 plain_round<kQ>(capped));
  }
}

void test_half_to_float() {
  for (unsigned bits = 0; bits <= 0xffff; ++bits) {
    const uint16_t narrow = static_cast<uint16_t>(bits);
    _Float16 half;
    std::memcpy(&half, &narrow, sizeof(half));
    const float expected = static_cast<float>(half), got = sq::to_float(Float16{narrow});
    const bool same = std::isnan(expected) ? std::isnan(got) : sq::float_bits(got) == sq::float_bits(expected);
    if (!same) report("fp16 bits " + std::to_string(bits) + " become " + std::to_string(got));
  }
}

static_assert(sq::row_config(0, true).threads == 32 && sq::row_config(264, true).threads == 64, "whole warps");
static_assert(sq::row_config(4096, true).groups == 1 && sq::row_config(4104, true).groups == 2, "few for short rows");
static_assert(sq::row_config(32768, true).groups == 8 && sq::row_config(32776, true).groups == 0, "many for long rows");
static_assert(sq::row_config(4096, false).groups == 0, "none without wide words");

template <typename T, bool kRotates>
auto choose(int groups) {
  switch (groups) {
    case 1:
      return sq::quantize_rows_kernel<T, 1, kRotates>;
    case 2:
      return sq::quantize_rows_kernel<T, 2, kRotates>;
    case 4:
      return sq::quantize_rows_kernel<T, 4, kRotates>;
    case 8:
      return sq::quantize_rows_kernel<T, 8, kRotates>;
    default:
      return sq::quantize_rows_kernel<T, 0, kRotates>;
  }
}

template <typename T>
void run_rows(const T* x, const float* smooth, const sq::QuantizedRows& target, int64_t rows, int64_t columns,
              int64_t rotate) {
  const bool wide = sq::can_move_groups(columns, x, smooth, target.q);
  const sq::RowConfig config = sq::row_config(columns, wide);
  const auto kernel = rotate == 0 ? choose<T, false>(config.groups) : choose<T, true>(config.groups);
  shim::run_grid(kernel, static_cast<unsigned>(rows), static_cast<unsigned>(config.threads), size_t{0}, x, smooth,
                 target, columns, wide, sq::rotation_of(rotate));
}

// `offset` elements before x and q take the alignment away.
template <typename T, DType kQ>
void test_rows(const char* name, int64_t columns, bool smoothed, int64_t offset, float static_scale,
               int64_t rotate = 0) {
  const float specials[] = {NAN, INFINITY, -INFINITY};
  constexpr int64_t kRows = 9;
  std::mt19937 random(static_cast<unsigned>(columns));
  auto x = random_values<T>(random, offset + kRows * columns, 3.0f);
  T* rows = x.data() + offset;
  for (int64_t c = 0; c < columns; ++c) {
    rows[1 * columns + c] = from_float<T>(c % 2 ? 0.0f : -0.0f);
    rows[2 * columns + c] = from_float<T>(3e-39f * static_cast<float>(c % 5));  // subnormal in fp32 and bf16, 0 in fp16
    rows[3 * columns + c] = from_float<T>((c % 3 ? 1.0f : -1.0f) * 60000.0f);
  }
  for (int i = 0; i < 3 && columns > 0; ++i)
    rows[(4 + i) * columns + (i * 7919 + columns - 1) % columns] = from_float<T>(specials[i]);
  std::vector<float> smooth(columns);
  std::uniform_real_distribution<float> factor(0.01f, 20.0f);
  for (float& s : smooth) s = factor(random);

  constexpr uint8_t kGuard = 0xa5;
  std::vector<uint8_t> q(offset + kRows * columns + 1, kGuard);
  std::vector<float> scale(kRows, -1.0f);
  const sq::QuantizedRows target{q.data() + offset, scale.data(), static_scale == 0 ? nullptr : &static_scale, kQ};
  run_rows<T>(rows, smoothed ? smooth.data() : nullptr, target, kRows, columns, rotate);

  for (int64_t r = 0; r < kRows; ++r) {
    std::vector<float> values(columns);
    float absmax = 0.0f;
    bool finite = true;
    for (int64_t c = 0; c < columns; ++c) {
      values[c] = sq::to_float(rows[r * columns + c]);
      if (smoothed) values[c] = values[c] / smooth[c];
    }
    sq::rotate_plainly(values.data(), columns, rotate);
    for (int64_t c = 0; c < columns; ++c) {
      finite = finite && std::isfinite(values[c]);
      absmax = std::fmax(absmax, std::fabs(values[c]));
    }
    const bool is_static = static_scale != 0;
    const float own_scale = is_static ? static_scale : absmax == 0.0f ? 1.0f : absmax / kQMax<kQ>;
    const float expected_scale = finite ? own_scale : NAN;
    expect_equal(name, "bits of the scale of row", r, sq::float_bits(scale[r]), sq::float_bits(expected_scale));
    const float inverse = is_static ? 1.0f / static_scale : std::fmin(kQMax<kQ> / absmax, FLT_MAX);
    for (int64_t c = 0; c < columns; ++c) {
      const float scaled = std::fmin(std::fmax(values[c] * inverse, -kQMax<kQ>), kQMax<kQ>);
      const int expected = finite && (is_static || absmax != 0.0f) ? plain_round<kQ>(scaled) : 0;
      expect_equal(name, "element", r * columns + c, q[offset + r * columns + c], expected);
    }
  }
  expect_equal(name, "written past the end of", kRows * columns, q.back(), kGuard);
  for (int64_t i = 0; i < offset; ++i) expect_equal(name, "written before the beginning, at", i, q[i], kGuard);
}

template <typename T, DType kQ>
void test_static(const char* name, int64_t count, unsigned blocks, int64_t offset, int64_t rotate = 0) {
  std::mt19937 random(7);
  auto x = random_values<T>(random, offset + count, 3.0f);
  const float specials[] = {NAN, INFINITY, -INFINITY, 0.0f};
  for (int64_t i = 0; i < 4 && i < count; ++i) x[offset + i * (count - 1) / 4] = from_float<T>(specials[i]);
  const float scale = 0.0173f;
  constexpr uint8_t kGuard = 0xa5;
  std::vector<uint8_t> q(offset + count + 1, kGuard);
  const T* values = x.data() + offset;
  const bool wide = sq::is_group_aligned(values) && sq::is_group_aligned(q.data() + offset);
  const auto kernel = rotate == 0 ? sq::quantize_static_kernel<T, false> : sq::quantize_static_kernel<T, true>;
  shim::run_grid(kernel, blocks, 64u, size_t{0}, values, &scale, q.data() + offset, kQ, count, wide,
                 sq::rotation_of(rotate));
  std::vector<float> rotated(count);
  for (int64_t i = 0; i < count; ++i) rotated[i] = sq::to_float(values[i]);
  sq::rotate_plainly(rotated.data(), count, rotate);
  for (int64_t i = 0; i < count; ++i) {
    const float scaled = rotated[i] * (1.0f / scale);
    const float capped = std::isnan(scaled) ? scaled : std::fmin(std::fmax(scaled, -kQMax<kQ>), kQMax<kQ>);
    // infinity - infinity is a NaN of either sign
    const int sign = rotate != 0 && kQ != DType::kInt8 && std::isnan(scaled) ? 0x80 : 0;
    expect_equal(name, "static element", i, q[offset + i] | sign, plain_round<kQ>(capped) | sign);
  }
  expect_equal(name, "static, written past the end of", count, q.back(), kGuard);
}

template <typename T, DType kQ>
void test_types(const char* name) {
  // 1 group a thread, a ragged row, and rows just within each number of groups and just past the last.
  for (int64_t columns : {0, 1, 7, 8, 33, 576, 4096, 4100, 4104, 8192, 16384, 32768, 32776}) {
    // The longest rows are slow in a sanitizer: int8 shows what they have of their own.
    if (columns > 5000 && kQ != DType::kInt8) continue;
    for (bool smoothed : {false, true}) test_rows<T, kQ>(name, columns, smoothed, 0, 0.0f);
    test_rows<T, kQ>(name, columns, true, 3, 0.0f);
    test_rows<T, kQ>(name, columns, true, 0, 0.013f);
  }
  // Each size of a block, in rows that end within a warp and with one, and in each number of groups.
  for (int64_t columns : {0, 16, 48, 256, 320, 4096, 4112, 8192, 16384, 32768, 33024}) {
    const bool is_long = columns > 1000;
    if (is_long && kQ != DType::kInt8) continue;
    if (columns > 5000 && !std::is_same_v<T, BFloat16>) continue;
    for (int64_t rotate : {16, 32, 64, 128, 256}) {
      if (columns % rotate != 0 || (is_long && rotate != 16 && rotate != 256)) continue;
      test_rows<T, kQ>(name, columns, rotate == 64, 0, rotate == 32 ? 0.013f : 0.0f, rotate);
      if (columns < 5000) test_rows<T, kQ>(name, columns, rotate == 128, 3, 0.0f, rotate);
      if (columns > 0) test_static<T, kQ>(name, columns, 3, rotate % 3, rotate);
    }
  }
  for (int64_t count : {1, 8, 1000, 4099}) {
    test_static<T, kQ>(name, count, 3, 0);
    test_static<T, kQ>(name, count, 3, 1);
  }
}

template <DType kQ>
void test_quantized_type(const char* name) {
  test_rounding<kQ>(name);
  test_types<float, kQ>(name);
  test_types<BFloat16, kQ>(name);
  test_types<Float16, kQ>(name);
}

}  // namespace

int main() {
  test_half_to_float();
  test_quantized_type<DType::kInt8>("int8");
  test_quantized_type<DType::kFloat8E4M3>("e4m3");
  test_quantized_type<DType::kFloat8E5M2>("e5m2");
  if (failures > 0) std::fprintf(stderr, "%d failures\n", failures);
  return failures > 0;
}
