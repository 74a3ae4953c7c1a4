// The CPU kernels of every instruction set that this machine can run, against plain loops. Buffers have exactly the sizes
// that the headers promise, so that the address sanitizer sees any step outside.
#include <string>
#include <vector>

#include "cpu/kernels/dispatch.h"
#include "cpu/kernels/pack.h"
#include "native/testing.h"

namespace {

using namespace sq;

float decode(uint8_t value, DType dtype) {
  return dtype == DType::kFloat8E4M3 ? float8_e4m3_to_float(value) : float8_e5m2_to_float(value);
}

// --- types ----------------------------------------------------------------------------------------------------------

// Every 16-bit value survives the way to fp32 and back; every fp32 goes to the nearest one, to the even one of two.
template <class T>
void test_16_bit_type(uint32_t infinity) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const T value{static_cast<uint16_t>(bits)};
    const float wide = to_float(value);
    T back;
    from_float(wide, &back);
    if ((bits & 0x7FFF) > infinity) {
      CHECK(std::isnan(wide) && std::isnan(to_float(back)), "%x", bits);
      continue;
    }
    CHECK(back.bits == bits, "%x became %x", bits, back.bits);
    if ((bits & 0x7FFF) >= infinity - 1) continue;
    const float next = to_float(T{static_cast<uint16_t>(bits + 1)});
    const float middle = wide + (next - wide) / 2;  // exact: one more bit than the type has
    const auto rounded = [](float x) {
      T out;
      from_float(x, &out);
      return uint32_t{out.bits};
    };
    CHECK(rounded(middle) == bits + (bits & 1), "%x", bits);
    CHECK(rounded(std::nextafter(middle, wide)) == bits, "%x", bits);
    CHECK(rounded(std::nextafter(middle, next)) == bits + 1, "%x", bits);
  }
}

void test_8_bit_type(DType dtype, uint8_t (*encode)(float), int finite) {
  for (int sign = 0; sign < 256; sign += 128) {
    for (int magnitude = 0; magnitude < finite; ++magnitude) {
      const auto bits = static_cast<uint8_t>(sign + magnitude);
      const float wide = decode(bits, dtype);
      CHECK(encode(wide) == bits, "%x", bits);
      if (magnitude == finite - 1) continue;
      const float next = decode(static_cast<uint8_t>(bits + 1), dtype);
      const float middle = wide + (next - wide) / 2;
      CHECK(encode(middle) == bits + (bits & 1), "%x", bits);
      CHECK(encode(std::nextafter(middle, wide)) == bits, "%x", bits);
      CHECK(encode(std::nextafter(middle, next)) == bits + 1, "%x", bits);
    }
  }
  CHECK(std::isnan(decode(0x7F, dtype)) && std::isnan(decode(0xFF, dtype)), "NaN");
  CHECK(encode(NAN) == 0x7F && encode(-NAN) == 0xFF, "NaN");
}

// --- quantize -------------------------------------------------------------------------------------------------------

uint8_t quantize_value(float value, DType dtype) {
  const float limit = quantized_max(dtype);
  if (dtype == DType::kInt8 && std::isnan(value)) return 0;
  if (!std::isnan(value)) value = std::fmin(std::fmax(value, -limit), limit);
  if (dtype == DType::kFloat8E4M3) return float_to_float8_e4m3(value);
  if (dtype == DType::kFloat8E5M2) return float_to_float8_e5m2(value);
  return static_cast<uint8_t>(static_cast<int8_t>(std::nearbyint(value)));
}

template <class T>
void test_quantize(const Kernels& kernels, DType x_dtype, DType q_dtype, int64_t rows, int64_t k, bool is_static,
                   bool is_smooth) {
  Buffer<T> x(rows * k);
  Buffer<float> smooth(k), scale(rows);
  for (int64_t i = 0; i < x.size(); ++i) from_float(random_float() * 3, &x[i]);
  for (int64_t i = 0; i < k; ++i) smooth[i] = 0.5f + std::fabs(random_float());
  if (rows > 2 && k > 0) {
    from_float(NAN, &x[k + k / 2]);
    for (int64_t i = 0; i < k; ++i) from_float(0.0f, &x[2 * k + i]);
  }
  const int64_t stride = k + 5;
  Buffer<uint8_t> q(rows > 0 ? (rows - 1) * stride + k : 0);
  QuantizeArgs args{};
  args.k = k;
  args.x = x.data();
  args.x_dtype = x_dtype;
  args.smooth = is_smooth ? smooth.data() : nullptr;
  args.q = q.data();
  args.q_stride = stride;
  args.q_dtype = q_dtype;
  args.flip = q_dtype == DType::kInt8 ? kOffset : 0;
  args.scale = scale.data();
  args.static_scale = is_static ? 0.05f : 0.0f;
  kernels.quantize.run(args, {0, rows / 2});
  kernels.quantize.run(args, {rows / 2, rows});
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<float> values;
    float absmax = 0;
    bool is_finite = true;
    for (int64_t i = 0; i < k; ++i) {
      const float value = is_smooth ? to_float(x[row * k + i]) / smooth[i] : to_float(x[row * k + i]);
      values.push_back(value);
      is_finite = is_finite && std::isfinite(value);
      absmax = std::fmax(absmax, std::fabs(value));
    }
    const float limit = quantized_max(q_dtype);
    const float zero_scale = absmax == 0 ? 1.0f : absmax / limit;
    const float expected_scale = !is_finite ? NAN : is_static ? 0.05f : zero_scale;
    CHECK(same(scale[row], expected_scale), "row %" PRId64 ": scale %g, expected %g", row, scale[row], expected_scale);
    for (int64_t i = 0; i < k; ++i) {
      const float multiplier = is_static ? 1.0f / 0.05f : absmax == 0 ? 0.0f : limit / absmax;
      const int expected = (is_finite ? quantize_value(values[i] * multiplier, q_dtype) : 0) ^ args.flip;
      const int actual = q[row * stride + i];
      CHECK(actual == expected, "row %" PRId64 ", k %" PRId64 ": %d, expected %d", row, i, actual, expected);
    }
  }
}

// --- products -------------------------------------------------------------------------------------------------------

struct Problem {
  int64_t m, n, k;
  bool has_bias;
};

struct Output {
  Buffer<float> a_scale, b_scale, bias, y;

  explicit Output(const Problem& p) : a_scale(p.m), b_scale(p.n), bias(p.n), y(p.m * p.n) {
    for (int64_t i = 0; i < p.m; ++i) a_scale[i] = 0.01f + std::fabs(random_float());
    for (int64_t i = 0; i < p.n; ++i) b_scale[i] = 0.01f + std::fabs(random_float());
    for (int64_t i = 0; i < p.n; ++i) bias[i] = random_float();
  }

  void describe(const Problem& p, GemmArgs* args) const {
    args->m = p.m;
    args->n = p.n;
    args->k = p.k;
    args->a_scale = a_scale.data();
    args->a_scale_step = 1;
    args->b_scale = b_scale.data();
    args->b_scale_step = 1;
    args->bias = p.has_bias ? bias.data() : nullptr;
    args->bias_dtype = DType::kFloat32;
    args->y = y.data();
    args->y_dtype = DType::kFloat32;
  }
};

// In four pieces, as threads would.
void run(GemmRange gemm, const GemmArgs& args, const Problem& p) {
  const int64_t panels = panel_count(p.n), some_rows = p.m / 64 * 32, some_panels = panels / 2;
  for (Range rows : {Range{0, some_rows}, Range{some_rows, p.m}}) {
    for (Range columns : {Range{0, some_panels}, Range{some_panels, panels}}) {
      if (rows.begin < rows.end && columns.begin < columns.end) gemm(args, rows, columns);
    }
  }
}

Buffer<uint8_t> pack(const Buffer<uint8_t>& b, const Problem& p, DType dtype) {
  Buffer<uint8_t> packed(panel_count(p.n) * panel_bytes(p.k));
  pack_panels(b.data(), p.n, p.k, dtype, packed.data(), {0, panel_count(p.n)});
  return packed;
}

void test_int8(const Kernels& kernels, const Problem& p, bool is_largest) {
  const int64_t stride = padded_k(p.k) + kRowPad;
  Buffer<uint8_t> q(p.m * p.k), a((padded_rows(p.m) - 1) * stride + padded_k(p.k)), b(p.n * p.k);
  for (int64_t i = 0; i < a.size(); ++i) a[i] = static_cast<uint8_t>(random_int(0, 255));  // what does not count
  for (int64_t i = 0; i < q.size(); ++i) q[i] = static_cast<uint8_t>(is_largest ? 127 : random_int(-128, 127));
  for (int64_t i = 0; i < b.size(); ++i) b[i] = static_cast<uint8_t>(is_largest ? 127 : random_int(-128, 127));
  copy_rows(q.data(), p.k, kOffset, a.data(), stride, {0, p.m});
  const Buffer<uint8_t> packed = pack(b, p, DType::kInt8);
  const Output output(p);
  GemmArgs args{};
  output.describe(p, &args);
  args.a = a.data();
  args.a_stride = stride;
  args.b = packed.data();
  args.b_dtype = DType::kInt8;
  run(kernels.int8.run, args, p);
  for (int64_t m = 0; m < p.m; ++m) {
    for (int64_t n = 0; n < p.n; ++n) {
      int64_t sum = 0;
      for (int64_t k = 0; k < p.k; ++k) {
        sum += static_cast<int8_t>(q[m * p.k + k]) * static_cast<int8_t>(b[n * p.k + k]);
      }
      float expected = static_cast<float>(sum) * (output.a_scale[m] * output.b_scale[n]);
      if (p.has_bias) expected += output.bias[n];
      CHECK(same(output.y[m * p.n + n], expected), "[%" PRId64 ", %" PRId64 "]: %g, expected %g", m, n,
            output.y[m * p.n + n], expected);
    }
  }
}

void test_fp8(const Kernels& kernels, const Problem& p, DType a_dtype, DType b_dtype) {
  const int64_t stride = p.k + 3;
  const int64_t wide_stride = padded_k(p.k) * kernels.fp8.element_size + kRowPad;
  const auto random_finite = [](DType dtype) {
    return static_cast<uint8_t>(random_int(0, dtype == DType::kFloat8E4M3 ? 0x7E : 0x7B) | random_int(0, 1) << 7);
  };
  Buffer<uint8_t> q((p.m - 1) * stride + p.k), b(p.n * p.k);
  Buffer<uint8_t> a((padded_rows(p.m) - 1) * wide_stride + padded_k(p.k) * kernels.fp8.element_size);
  for (int64_t i = 0; i < a.size(); ++i) a[i] = 0xFF;  // NaN, in rows and columns that do not count
  for (int64_t i = 0; i < q.size(); ++i) q[i] = random_finite(a_dtype);
  for (int64_t i = 0; i < b.size(); ++i) b[i] = random_finite(b_dtype);
  kernels.fp8.widen({p.k, q.data(), stride, a_dtype, a.data(), wide_stride}, {0, p.m});
  const Buffer<uint8_t> packed = pack(b, p, b_dtype);
  const Output output(p);
  GemmArgs args{};
  output.describe(p, &args);
  args.a = a.data();
  args.a_stride = wide_stride;
  args.b = packed.data();
  args.b_dtype = b_dtype;
  run(kernels.fp8.run, args, p);
  for (int64_t m = 0; m < p.m; ++m) {
    for (int64_t n = 0; n < p.n; ++n) {
      double sum = 0, magnitude = 0;
      for (int64_t k = 0; k < p.k; ++k) {
        const double product =
            static_cast<double>(decode(q[m * stride + k], a_dtype)) * decode(b[n * p.k + k], b_dtype);
        sum += product;
        magnitude += std::fabs(product);
      }
      const double scale = static_cast<double>(output.a_scale[m]) * output.b_scale[n];
      const double bias = p.has_bias ? output.bias[n] : 0.0;
      // K additions in any order, two products with scales and one bias, each off by at most 2^-24 of the magnitude.
      const double bound = (static_cast<double>(p.k) + 3) * 0x1p-23 * (magnitude * scale + std::fabs(bias));
      const double error = std::fabs(output.y[m * p.n + n] - (sum * scale + bias));
      CHECK(error <= bound, "[%" PRId64 ", %" PRId64 "]: off by %g, allowed %g", m, n, error, bound);
    }
  }
}

void test_pack(const Problem& p) {
  Buffer<uint8_t> b(p.n * p.k);
  for (int64_t i = 0; i < b.size(); ++i) b[i] = static_cast<uint8_t>(random_int(0, 255));
  const Buffer<uint8_t> packed = pack(b, p, DType::kInt8);
  const int64_t groups = padded_k(p.k) / 4;
  for (int64_t panel = 0; panel < panel_count(p.n); ++panel) {
    for (int64_t column = 0; column < kPanel; ++column) {
      const int64_t n = panel * kPanel + column;
      int32_t sum = 0, packed_sum = 0;
      for (int64_t k = 0; k < groups * 4; ++k) {
        const int expected = n < p.n && k < p.k ? b[n * p.k + k] : 0;
        const int actual = packed[panel * panel_bytes(p.k) + k / 4 * 256 + column * 4 + k % 4];
        CHECK(actual == expected, "column %" PRId64 ", k %" PRId64, n, k);
        sum += static_cast<int8_t>(expected);
      }
      std::memcpy(&packed_sum, packed.data() + panel * panel_bytes(p.k) + groups * 256 + column * 4, 4);
      CHECK(packed_sum == sum, "column %" PRId64, n);
    }
  }
}

void test_kernels(const Isa& isa) {
  const Kernels& kernels = kernels_of(isa);
  for (DType q_dtype : {DType::kInt8, DType::kFloat8E4M3, DType::kFloat8E5M2}) {
    for (int64_t k : {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130, 700}) {
      for (int variant = 0; variant < 4; ++variant) {
        const bool is_static = (variant & 1) != 0, is_smooth = (variant & 2) != 0;
        test_quantize<float>(kernels, DType::kFloat32, q_dtype, 7, k, is_static, is_smooth);
        test_quantize<BFloat16>(kernels, DType::kBFloat16, q_dtype, 7, k, is_static, is_smooth);
        test_quantize<Float16>(kernels, DType::kFloat16, q_dtype, 7, k, is_static, is_smooth);
      }
    }
  }
  const int64_t sizes[] = {1, 3, 4, 31, 33, 63, 64, 65, 130};
  const int64_t row_counts[] = {1, 2, 5, 6, 7, 12, 15, 16, 17, 31, 32, 33, 100, 250};
  for (int64_t m : row_counts) {
    for (int repeat = 0; repeat < 6; ++repeat) {
      const Problem p{m, sizes[random_int(0, 8)], sizes[random_int(0, 8)] + (repeat == 0 ? 700 : 0), repeat % 2 == 0};
      test_int8(kernels, p, false);
      test_fp8(kernels, p, DType::kFloat8E4M3, repeat % 3 == 0 ? DType::kFloat8E5M2 : DType::kFloat8E4M3);
      test_fp8(kernels, p, DType::kFloat8E5M2, DType::kFloat8E5M2);
    }
  }
  for (int64_t m : {1, 40, 600}) test_int8(kernels, {m, 3, 1300, true}, false);
  for (int64_t m : {1, 7, 33}) test_int8(kernels, {m, 2, 131071, false}, true);
  // Several chunks of the depth, groups of columns and blocks of rows in the same call.
  test_int8(kernels, {6, 2150, 4200, true}, false);
  test_int8(kernels, {300, 70, 4160, false}, false);
  test_fp8(kernels, {37, 70, 2100, true}, DType::kFloat8E4M3, DType::kFloat8E4M3);
  std::printf("%s: passed\n", isa.name);
}

}  // namespace

int main() {
  test_16_bit_type<BFloat16>(0x7F80);
  test_16_bit_type<Float16>(0x7C00);
  test_8_bit_type(DType::kFloat8E4M3, float_to_float8_e4m3, 0x7F);
  test_8_bit_type(DType::kFloat8E5M2, float_to_float8_e5m2, 0x7C);
  for (int64_t n : {1, 63, 64, 65, 130}) {
    for (int64_t k : {1, 2, 3, 4, 63, 64, 65, 130}) test_pack({0, n, k, false});
  }
  for (const Isa& isa : isas()) {
    if (why_not(isa).empty()) {
      test_kernels(isa);
    } else {
      std::printf("%s: skipped, %s\n", isa.name, why_not(isa).c_str());
    }
  }
  return 0;
}
