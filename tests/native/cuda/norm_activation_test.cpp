// The CUDA norms and activations, run on the CPU, against the CPU kernels bit for bit; those are compared with formulas in
// fp64 in cpu_rows_test.cpp and with the oracle in tests/test_ops_rows.py.
#include "native/cuda/cuda_shim.h"

// After the shim.
#include <string>
#include <type_traits>
#include <vector>

#include "cpu/kernels/epilogue.h"
#include "cpu/kernels/norm_activation.h"
#include "cpu/kernels/quantize.h"
#include "cuda/kernels/activate.cuh"
#include "cuda/kernels/norm.cuh"
#include "native/rotation.h"
#include "native/testing.h"

namespace {

using namespace sq;

constexpr uint8_t kGuard = 0xa5;
constexpr DType kEightBit[] = {DType::kInt8, DType::kFloat8E4M3, DType::kFloat8E5M2};

// `offset` elements before the values take the alignment away.
template <class T>
struct Values {
  Buffer<T> memory;
  int64_t offset;
  Values(int64_t count, int64_t offset) : memory(random_values<T>(count + offset)), offset(offset) {}
  T* data() const { return memory.data() + offset; }
};

constexpr int64_t kRows = 6;

// Row 1 is zero, 2 and 3 have something that is not finite, 4 is tiny; 5 is constant, and mean times gain overflows.
template <class T>
void make_strange(T* x, int64_t columns) {
  for (int64_t c = 0; c < columns; ++c) {
    from_float(0.0f, &x[columns + c]);
    from_float(to_float(x[4 * columns + c]) * 1e-30f, &x[4 * columns + c]);
    from_float(std::is_same_v<T, Float16> ? 60000.0f : 3e36f, &x[5 * columns + c]);
  }
  if (columns == 0) return;
  from_float(NAN, &x[2 * columns + columns / 2]);
  from_float(-INFINITY, &x[3 * columns + columns - 1]);
}

struct Quantized {
  std::vector<uint8_t> q;
  std::vector<float> scale;
  Quantized(int64_t columns, int64_t offset) : q(offset + kRows * columns + 1, kGuard), scale(kRows + 1, -1.0f) {}
};

// What the CPU's quantizer makes of fp32 values.
Quantized quantize_plainly(const Buffer<float>& values, int64_t columns, float static_scale, DType dtype) {
  Quantized result(columns, 0);
  QuantizeArgs args{};
  args.k = args.q_stride = columns;
  args.x = values.data();
  args.x_dtype = DType::kFloat32;
  args.q = result.q.data();
  args.q_dtype = dtype;
  args.scale = result.scale.data();
  args.static_scale = static_scale;
  kQuantizePortable.run(args, {0, kRows});
  return result;
}

void expect_same(const Quantized& got, const Quantized& expected, int64_t offset, int64_t columns,
                 const std::string& what) {
  for (int64_t row = 0; row <= kRows; ++row) {
    CHECK(same(got.scale[row], expected.scale[row]), "%s, columns %" PRId64 ", row %" PRId64 ": %g, expected %g",
          what.c_str(), columns, row, got.scale[row], expected.scale[row]);
  }
  for (int64_t i = 0; i < kRows * columns; ++i) {
    CHECK(got.q[offset + i] == expected.q[i], "%s, columns %" PRId64 ", element %" PRId64 ": %d, expected %d",
          what.c_str(), columns, i, got.q[offset + i], expected.q[i]);
  }
  CHECK(got.q.back() == kGuard, "%s: written past the end", what.c_str());
  for (int64_t i = 0; i < offset; ++i) CHECK(got.q[i] == kGuard, "%s: written before the beginning", what.c_str());
}

template <class T, bool kQuantize, bool kRotates = false>
void run_norm(const NormTask<T>& job) {
  const NormConfig config = norm_config(job.columns, job.wide);
  const auto kernel = [&] {
    switch (config.groups) {
      case 1:
        return norm_rows_kernel<T, 1, kQuantize, kRotates>;
      case 2:
        return norm_rows_kernel<T, 2, kQuantize, kRotates>;
      case 4:
        return norm_rows_kernel<T, 4, kQuantize, kRotates>;
      default:
        return norm_rows_kernel<T, 0, kQuantize, kRotates>;
    }
  }();
  const size_t bytes = config.groups == 0 ? 0 : static_cast<size_t>(job.columns) * sizeof(T);
  shim::run_grid(kernel, static_cast<unsigned>(kRows), static_cast<unsigned>(config.threads), bytes, job);
}

template <class T, class W>
void test_norm(Norm norm, int64_t columns, bool has_residual, bool has_bias, DType dtype, float static_scale,
               int64_t offset) {
  const Values<T> x(kRows * columns, offset), residual(kRows * columns, offset);
  const Values<W> weight(columns, offset), bias(columns, offset);
  make_strange(x.data(), columns);
  if (has_residual) {
    for (int64_t c = 0; c < columns; ++c) from_float(-0.0f, &residual.data()[columns + c]);
  }
  const float weight_offset = norm == Norm::kRms ? 1.0f : -0.0f;

  // The CPU's.
  Buffer<T> sum(has_residual ? kRows * columns : 0);
  Buffer<float> wide_weight(columns), wide_bias(columns), values(kRows * columns);
  widen(weight.data(), weight_offset, columns, wide_weight.data());
  widen(bias.data(), -0.0f, columns, wide_bias.data());
  NormArgs args{};
  args.norm = norm;
  args.k = columns;
  args.x = x.data();
  args.residual = has_residual ? residual.data() : nullptr;
  args.x_dtype = kDType<T>;
  args.weight = wide_weight.data();
  args.bias = has_bias ? wide_bias.data() : nullptr;
  args.eps = 1e-5f;
  args.sum = sum.data();
  args.y = values.data();
  args.y_dtype = DType::kFloat32;
  kNormActivationPortable.norm(args, {0, kRows});
  const Quantized expected = quantize_plainly(values, columns, static_scale, dtype);
  for (int64_t i = 0; i < values.size(); ++i) values[i] = rounded<T>(values[i]);
  const Quantized expected_rounded = quantize_plainly(values, columns, static_scale, dtype);

  Quantized got(columns, offset);
  Values<T> got_sum(has_residual ? kRows * columns : 0, offset);
  NormTask<T> job{};
  job.x = x.data();
  job.residual = has_residual ? residual.data() : nullptr;
  job.sum = has_residual ? got_sum.data() : nullptr;
  job.weight = weight.data();
  job.bias = has_bias ? bias.data() : nullptr;
  job.weight_dtype = job.bias_dtype = kDType<W>;
  job.offset = weight_offset;
  job.eps = 1e-5f;
  job.is_layer = norm == Norm::kLayer;
  job.columns = columns;
  job.wide = offset == 0 && columns % kGroup == 0;
  job.target = {got.q.data() + offset, got.scale.data(), static_scale == 0 ? nullptr : &static_scale, dtype};
  run_norm<T, true>(job);
  const std::string what = std::string(norm == Norm::kLayer ? "layer norm" : "rms norm") +
                           (has_residual ? ", residual" : "") + (has_bias ? ", bias" : "");
  expect_same(got, expected, offset, columns, what);
  for (int64_t i = 0; i < sum.size(); ++i) {
    CHECK(same(to_float(got_sum.data()[i]), to_float(sum[i])), "%s: sum %" PRId64, what.c_str(), i);
  }
  job.is_rounded = true;
  run_norm<T, true>(job);
  expect_same(got, expected_rounded, offset, columns, what + ", rounded");
  for (int64_t rotate = 16; rotate <= 256 && columns % rotate == 0; rotate *= 2) {
    Buffer<float> turned(values.size());
    for (int64_t i = 0; i < values.size(); ++i) turned[i] = values[i];
    rotate_plainly(turned.data(), turned.size(), rotate);
    job.rotation = rotation_of(rotate);
    run_norm<T, true, true>(job);
    expect_same(got, quantize_plainly(turned, columns, static_scale, dtype), offset, columns,
                what + ", rounded, rotated by " + std::to_string(rotate));
  }
  job.is_rounded = false;

  if (norm == Norm::kLayer || has_residual || dtype != DType::kInt8) return;
  Buffer<T> y(kRows * columns), got_y(kRows * columns);
  args.y = y.data();
  args.y_dtype = args.x_dtype;
  kNormActivationPortable.norm(args, {0, kRows});
  job.y = got_y.data();
  job.wide = job.wide && is_group_aligned(got_y.data());
  run_norm<T, false>(job);
  for (int64_t i = 0; i < y.size(); ++i) {
    CHECK(same(to_float(got_y[i]), to_float(y[i])), "rms norm, columns %" PRId64 ", y %" PRId64, columns, i);
  }
}

// is_joined: gate and up are the halves of the rows of one matrix.
template <Activation kActivation, class T>
void test_activation(int64_t columns, bool is_gated, bool is_kept, DType dtype, float static_scale, int64_t offset,
                     bool is_joined = false, int64_t rotate = 0) {
  const Values<T> gate(kRows * columns, offset), up(kRows * columns, offset);
  make_strange(gate.data(), columns);
  Buffer<float> values(kRows * columns);
  ActivateArgs args{};
  args.activation = kActivation;
  args.k = columns;
  args.gate = gate.data();
  args.up = is_gated ? up.data() : nullptr;
  args.dtype = kDType<T>;
  args.v = values.data();
  kNormActivationPortable.activate(args, {0, kRows});
  rotate_plainly(values.data(), values.size(), rotate);
  const Quantized expected = quantize_plainly(values, columns, static_scale, dtype);

  Quantized got(columns, offset);
  const Buffer<T> both(is_joined ? 2 * kRows * columns : 0);
  for (int64_t i = 0; i < both.size() / 2; ++i) {
    T* row = both.data() + i / columns * 2 * columns + i % columns;
    row[0] = gate.data()[i];
    row[columns] = up.data()[i];
  }
  ActivateTask<T> job{};
  job.gate = is_joined ? both.data() : gate.data();
  job.up = is_joined ? both.data() + columns : is_gated ? up.data() : nullptr;
  job.columns = columns;
  job.row_step = is_joined ? 2 * columns : columns;
  job.wide = offset == 0 && columns % kGroup == 0;
  job.is_kept = is_kept;
  job.rotation = rotation_of(rotate);
  job.target = {got.q.data() + offset, got.scale.data(), static_scale == 0 ? nullptr : &static_scale, dtype};
  const int threads = activate_threads(columns);
  const size_t bytes = is_kept ? static_cast<size_t>(activate_room(columns, threads)) : 0;
  const auto kernel =
      rotate == 0 ? activate_rows_kernel<kActivation, T, false> : activate_rows_kernel<kActivation, T, true>;
  shim::run_grid(kernel, static_cast<unsigned>(kRows), static_cast<unsigned>(threads), bytes, job);
  const std::string what = "activation " + std::to_string(static_cast<int>(kActivation));
  expect_same(got, expected, offset, columns, what + ", rotated by " + std::to_string(rotate));
}

static_assert(norm_config(0, true).threads == 64 && norm_config(576, true).threads == 64,
              "the lanes of a sum at least");
static_assert(norm_config(512, true).groups == 1 && norm_config(576, true).groups == 2);
static_assert(norm_config(4096, true).threads == 256 && norm_config(4096, true).groups == 2);
static_assert(norm_config(8192, true).groups == 2 && norm_config(16384, true).groups == 4);
static_assert(norm_config(16392, true).groups == 0 && norm_config(4096, false).groups == 0);
static_assert(activate_threads(0) == 32 && activate_threads(4096) == 256 && activate_threads(14336) == 448);
static_assert(activate_room(14336, 448) == 14336 * 4, "no thread idles at Llama's width");

template <class T>
void test_type() {
  for (int64_t columns : {0, 1, 7, 8, 63, 64, 65, 100, 576, 1025, 4096, 8200, 16384, 16392, 16896}) {
    const bool is_long = columns > 1100;  // slow here: fewer cases of them
    for (Norm norm : {Norm::kRms, Norm::kLayer}) {
      for (bool has_residual : {false, true}) {
        for (bool has_bias : {false, true}) {
          if ((has_bias && norm == Norm::kRms) || (is_long && has_bias != has_residual)) continue;
          const float static_scale = has_bias ? 0.03f : 0.0f;
          for (DType dtype : kEightBit) {
            if (is_long && dtype != DType::kInt8) continue;
            test_norm<T, float>(norm, columns, has_residual, has_bias, dtype, static_scale, 0);
          }
          if (is_long) continue;
          test_norm<T, BFloat16>(norm, columns, has_residual, has_bias, DType::kInt8, 0.0f, 0);
          test_norm<T, Float16>(norm, columns, has_residual, has_bias, DType::kInt8, 0.0f, 3);
        }
      }
    }
  }
  for (int64_t columns : {0, 1, 7, 8, 255, 256, 1000, 4096, 8200}) {
    for (bool is_kept : {false, true}) {
      const int64_t offset = is_kept ? 0 : 1;
      for (DType dtype : kEightBit) test_activation<Activation::kSilu, T>(columns, true, is_kept, dtype, 0.0f, 0);
      test_activation<Activation::kSilu, T>(columns, true, is_kept, DType::kInt8, 0.05f, offset);
      test_activation<Activation::kSilu, T>(columns, true, is_kept, DType::kInt8, 0.0f, 0, true);
      test_activation<Activation::kGelu, T>(columns, is_kept, is_kept, DType::kInt8, 0.0f, offset);
      test_activation<Activation::kGeluTanh, T>(columns, !is_kept, is_kept, DType::kInt8, 0.0f, offset);
      test_activation<Activation::kRelu, T>(columns, false, is_kept, DType::kFloat8E4M3, 0.0f, offset);
    }
  }
  // Rows that end within a warp and with one, of one and of several rounds.
  for (int64_t columns : {0, 16, 48, 256, 320, 1024, 4096, 8448}) {
    for (int64_t rotate : {16, 32, 64, 128, 256}) {
      if (columns % rotate != 0) continue;
      if (columns > 1100 && (rotate != 256 || !std::is_same_v<T, BFloat16>)) continue;
      for (bool is_kept : {false, true}) {
        const int64_t offset = is_kept ? 0 : 1;
        const DType dtype = kEightBit[rotate / 32 % 3];
        test_activation<Activation::kSilu, T>(columns, true, is_kept, dtype, 0.0f, 0, is_kept, rotate);
        if (columns > 1100) continue;
        test_activation<Activation::kGelu, T>(columns, is_kept, is_kept, DType::kInt8, 0.05f, offset, false, rotate);
        test_activation<Activation::kGeluTanh, T>(columns, !is_kept, is_kept, dtype, 0.0f, offset, false, rotate);
        test_activation<Activation::kRelu, T>(columns, false, is_kept, DType::kInt8, 0.0f, offset, false, rotate);
      }
    }
  }
}

}  // namespace

int main() {
  test_type<float>();
  test_type<BFloat16>();
  test_type<Float16>();
}
