// Norms, activations and the floating-point product of every instruction set that this machine can run: the bits of the
// portable kernels, which are compared with fp64 formulas. Buffers have exactly the sizes that the headers promise.
#include <cstring>
#include <vector>

#include "cpu/kernels/dispatch.h"
#include "native/rotation.h"
#include "native/testing.h"

namespace {

using namespace sq;

template <class T>
void test_norm(const Kernels& kernels, Norm norm, int64_t rows, int64_t k, bool has_residual, bool has_bias) {
  const Buffer<T> x = random_values<T>(rows * k), residual = random_values<T>(rows * k);
  const Buffer<float> weight = random_values<float>(k), bias = random_values<float>(k);
  Buffer<T> sum(has_residual ? rows * k : 0), portable_sum(has_residual ? rows * k : 0);
  Buffer<float> y(rows * k), portable_y(rows * k);
  NormArgs args{};
  args.norm = norm;
  args.k = k;
  args.x = x.data();
  args.residual = has_residual ? residual.data() : nullptr;
  args.x_dtype = kDType<T>;
  args.weight = weight.data();
  args.bias = has_bias ? bias.data() : nullptr;
  args.eps = 1e-5f;
  args.y_dtype = DType::kFloat32;
  args.sum = sum.data();
  args.y = y.data();
  kernels.norm_activation.norm(args, {0, rows / 2});
  args.y = y.data() + rows / 2 * k;
  kernels.norm_activation.norm(args, {rows / 2, rows});
  args.sum = portable_sum.data();
  args.y = portable_y.data();
  kNormActivationPortable.norm(args, {0, rows});
  for (int64_t row = 0; row < rows; ++row) {
    const auto value = [&](int64_t i) {
      return static_cast<double>(to_float(has_residual ? portable_sum[row * k + i] : x[row * k + i]));
    };
    double mean = 0, variance = 0, largest = 0;
    for (int64_t i = 0; i < k && norm == Norm::kLayer; ++i) mean += value(i) / static_cast<double>(k);
    for (int64_t i = 0; i < k; ++i) variance += (value(i) - mean) * (value(i) - mean) / static_cast<double>(k);
    for (int64_t i = 0; i < k; ++i) largest = std::fmax(largest, std::fabs(value(i)));
    const double gain = 1 / std::sqrt(variance + 1e-5);
    for (int64_t i = 0; i < k; ++i) {
      const int64_t at = row * k + i;
      CHECK(same(y[at], portable_y[at]), "[%" PRId64 ", %" PRId64 "]", row, i);
      if (has_residual) {
        T expected;
        from_float(to_float(x[at]) + to_float(residual[at]), &expected);
        CHECK(same(to_float(sum[at]), to_float(expected)), "[%" PRId64 ", %" PRId64 "]", row, i);
      }
      const double exact = (value(i) - mean) * gain * weight[i] + (has_bias ? bias[i] : 0.0);
      // fp32 sums of K terms move the mean by K ulp of the largest value, and the gain by K ulp of itself.
      const double bound = static_cast<double>(k + 8) * 0x1p-23 *
                               (std::fabs(exact) + largest * gain * std::fabs(weight[i]) * (1 + largest * gain)) +
                           1e-30;
      CHECK(std::fabs(y[at] - exact) <= bound, "[%" PRId64 ", %" PRId64 "]: %g, expected %g", row, i, y[at], exact);
    }
  }
}

double exact_activation(Activation activation, double x) {
  switch (activation) {
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    case Activation::kGelu:
      return x * 0.5 * std::erfc(-x * std::sqrt(0.5));
    case Activation::kGeluTanh:
      return x / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Activation::kRelu:
      return x < 0 ? 0 : x;
  }
  return 0;
}

template <class T>
void test_activation(const Kernels& kernels, Activation activation, int64_t rows, int64_t k, bool has_up) {
  const Buffer<T> gate = random_values<T>(rows * k), up = random_values<T>(rows * k);
  Buffer<float> v(rows * k), portable_v(rows * k);
  ActivateArgs args{};
  args.activation = activation;
  args.k = k;
  args.gate = gate.data();
  args.up = has_up ? up.data() : nullptr;
  args.dtype = kDType<T>;
  args.v = v.data();
  kernels.norm_activation.activate(args, {0, rows / 2});
  args.v = v.data() + rows / 2 * k;
  kernels.norm_activation.activate(args, {rows / 2, rows});
  args.v = portable_v.data();
  kNormActivationPortable.activate(args, {0, rows});
  for (int64_t i = 0; i < rows * k; ++i) {
    CHECK(same(v[i], portable_v[i]), "%" PRId64, i);
    const double exact = exact_activation(activation, to_float(gate[i])) * (has_up ? to_float(up[i]) : 1.0);
    // |gate| < 20: the exponentials' arguments are at most 200, rounded a few times.
    CHECK(std::fabs(v[i] - exact) <= 1e-4 * std::fabs(exact) + 1e-24, "%" PRId64 ": %g, expected %g", i, v[i], exact);
  }
}

// Entry (i, j) of Sylvester's matrix: the parity of the bits that both have.
double sylvester(int64_t i, int64_t j) { return __builtin_parityll(static_cast<uint64_t>(i & j)) != 0 ? -1 : 1; }

template <class T>
void test_hadamard(const Kernels& kernels, int64_t rows, int64_t k, int64_t block, bool has_smooth) {
  const Buffer<T> x = random_values<T>(rows * k);
  const Buffer<float> smooth = random_values<float>(has_smooth ? k : 0);
  Buffer<float> v(rows * k), plain(rows * k);
  for (int64_t i = 0; i < rows * k; ++i) plain[i] = has_smooth ? to_float(x[i]) / smooth[i % k] : to_float(x[i]);
  const Buffer<float> given(rows * k);
  std::memcpy(given.data(), plain.data(), sizeof(float) * static_cast<size_t>(rows * k));
  rotate_plainly(plain.data(), rows * k, block);

  HadamardArgs args{k, block, x.data(), kDType<T>, has_smooth ? smooth.data() : nullptr, v.data()};
  kernels.norm_activation.hadamard(args, {0, rows / 2});
  args.v = v.data() + rows / 2 * k;
  kernels.norm_activation.hadamard(args, {rows / 2, rows});
  // A partial sum is at most the sum of magnitudes, and rounded log2(block) times; the factor and the product once each.
  const double steps = std::log2(static_cast<double>(block)) + 3, root = std::sqrt(static_cast<double>(block));
  for (int64_t i = 0; i < rows * k; ++i) {
    CHECK(same(v[i], plain[i]), "block %" PRId64 ", %" PRId64 ": %g, expected %g", block, i, v[i], plain[i]);
    double exact = 0, magnitude = 0;
    for (int64_t j = 0; j < block; ++j) {
      const double value = given[i / block * block + j];
      exact += sylvester(i % block, j) * value / root;
      magnitude += std::fabs(value);
    }
    CHECK(std::fabs(v[i] - exact) <= steps * 0x1p-24 * magnitude / root, "block %" PRId64 ", %" PRId64, block, i);
  }

  // In place, and back: a matrix of entries 1 / root takes an error of each value root times as far, and adds its own.
  kernels.norm_activation.hadamard({k, block, v.data(), DType::kFloat32, nullptr, v.data()}, {0, rows});
  for (int64_t i = 0; i < rows * k; ++i) {
    double magnitude = 0;
    for (int64_t j = 0; j < block; ++j) magnitude += std::fabs(given[i / block * block + j]);
    const double bound = 2 * (steps + 1) * 0x1p-24 * magnitude;
    CHECK(std::fabs(v[i] - given[i]) <= bound, "block %" PRId64 ", %" PRId64 ": %g, was %g", block, i, v[i], given[i]);
  }
}

template <class T>
void test_combine(const Kernels& kernels, int64_t rows, int64_t count, int64_t k) {
  const int64_t sources = 4;
  const Buffer<float> x = random_values<float>(sources * k), weights = random_values<float>(rows * count);
  Buffer<int64_t> chosen(rows * count);
  for (int64_t i = 0; i < rows * count; ++i) chosen[i] = random_int(-1, sources - 1);
  Buffer<T> y(rows * k);
  const CombineArgs args{k, count, x.data(), chosen.data(), weights.data(), y.data(), kDType<T>};
  kernels.norm_activation.combine(args, {0, rows / 2});
  kernels.norm_activation.combine(args, {rows / 2, rows});
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < k; ++i) {
      float sum = 0;
      for (int64_t j = row * count; j < (row + 1) * count; ++j) {
        if (chosen[j] >= 0) sum += weights[j] * x[chosen[j] * k + i];
      }
      T expected;
      from_float(sum, &expected);
      CHECK(same(to_float(y[row * k + i]), to_float(expected)), "[%" PRId64 ", %" PRId64 "]", row, i);
    }
  }
}

void test_linear(const Kernels& kernels, int64_t m, int64_t n, int64_t k, bool has_bias) {
  const Buffer<BFloat16> x = random_values<BFloat16>(m * k), w = random_values<BFloat16>(n * k),
                         bias = random_values<BFloat16>(n), y(m * n);
  const LinearArgs args{m, n, k, x.data(), w.data(), has_bias ? bias.data() : nullptr, y.data()};
  kernels.linear.run(args, {0, n / 3});
  kernels.linear.run(args, {n / 3, n});
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      double exact = has_bias ? to_float(bias[j]) : 0.0, magnitude = std::fabs(exact);
      for (int64_t c = 0; c < k; ++c) {
        const double product = static_cast<double>(to_float(x[i * k + c])) * to_float(w[j * k + c]);
        exact += product;
        magnitude += std::fabs(product);
      }
      const double bound = 0x1p-8 * std::fabs(exact) + static_cast<double>(k + 2) * 0x1p-23 * magnitude;
      const double error = std::fabs(to_float(y[i * n + j]) - exact);
      CHECK(error <= bound, "[%" PRId64 ", %" PRId64 "]: off by %g, allowed %g", i, j, error, bound);
    }
  }
}

template <class T>
void test_type(const Kernels& kernels) {
  for (int64_t k : {1, 15, 16, 17, 64, 131}) {
    for (int variant = 0; variant < 8; ++variant) {
      const Norm norm = (variant & 1) != 0 ? Norm::kLayer : Norm::kRms;
      test_norm<T>(kernels, norm, 5, k, (variant & 2) != 0, (variant & 4) != 0);
    }
    for (Activation activation : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh, Activation::kRelu}) {
      for (bool has_up : {false, true}) test_activation<T>(kernels, activation, 5, k, has_up);
    }
    for (int64_t count : {0, 1, 3}) test_combine<T>(kernels, 5, count, k);
  }
  test_combine<T>(kernels, 2, 2, 1100);
  for (int64_t block : {16, 32, 64, 128, 256}) {
    for (int64_t blocks : {0, 1, 3}) {
      for (bool has_smooth : {false, true}) test_hadamard<T>(kernels, 3, blocks * block, block, has_smooth);
    }
  }
}

}  // namespace

int main() {
  for (const Isa& isa : isas()) {
    if (!why_not(isa).empty()) {
      std::printf("%s: skipped, %s\n", isa.name, why_not(isa).c_str());
      continue;
    }
    const Kernels& kernels = kernels_of(isa);
    test_type<float>(kernels);
    test_type<BFloat16>(kernels);
    test_type<Float16>(kernels);
    for (int64_t m : {1, 2, 3, 4, 5, 9, 16}) {
      for (int64_t n : {1, 3, 4, 5, 9}) {
        for (int64_t k : {1, 31, 32, 33, 100}) test_linear(kernels, m, n, k, (m + n) % 2 == 0);
      }
    }
    std::printf("%s: passed\n", isa.name);
  }
  return 0;
}
