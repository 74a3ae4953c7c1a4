// The parallel regions of the CPU ops, csrc/cpu/compute/parallel.h, on plain threads: any number of them gives the same
// bits, and the thread sanitizer sees whether two touch the same memory.
#include "cpu/compute/parallel.h"

#include <cstring>
#include <vector>

#include "cpu/kernels/pack.h"
#include "native/testing.h"

namespace {

using namespace sq;

constexpr int64_t kThreads[] = {1, 2, 3, 7};

// Calls run() with every number of threads; what it returns must be what one thread returns.
template <class Run>
void test_threads(const char* what, const Run& run) {
  std::vector<uint8_t> expected;
  for (int64_t threads : kThreads) {
    torch::stable::number_of_threads() = threads;
    const std::vector<uint8_t> actual = run();
    if (threads == 1) expected = actual;
    CHECK(actual == expected, "%s on %" PRId64 " threads", what, threads);
  }
}

template <class T>
Buffer<T> random_bytes(int64_t count) {
  Buffer<T> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = static_cast<T>(random_int(1, 127));
  return values;
}

Buffer<float> random_floats(int64_t count) {
  Buffer<float> values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = random_float();
  return values;
}

template <class T>
void append(const T* data, int64_t count, std::vector<uint8_t>* bytes) {
  const auto* begin = reinterpret_cast<const uint8_t*>(data);
  bytes->insert(bytes->end(), begin, begin + count * static_cast<int64_t>(sizeof(T)));
}

void test_products(const Kernels& kernels, int64_t m, int64_t k) {
  const int64_t widths[] = {70, 3, 640}, stride = padded_k(k) + kRowPad;
  // A block of rows of its own may begin anywhere, and be read up to the height of AMX's blocks.
  const Buffer<uint8_t> a = random_bytes<uint8_t>((m + 31) * stride);
  const Buffer<float> a_scale = random_floats(m);
  std::vector<Buffer<uint8_t>> packed;
  std::vector<Buffer<float>> scales, outputs;
  std::vector<GemmArgs> products;
  for (int64_t n : widths) {
    const Buffer<uint8_t> b = random_bytes<uint8_t>(n * k);
    packed.emplace_back(panel_count(n) * panel_bytes(k));
    pack_panels(b.data(), n, k, DType::kInt8, packed.back().data(), {0, panel_count(n)});
    scales.push_back(random_floats(n));
    outputs.emplace_back(m * n);
    GemmArgs args{};
    args.n = n;
    args.k = k;
    args.a = a.data();
    args.a_stride = stride;
    args.b = packed.back().data();
    args.b_dtype = DType::kInt8;
    args.a_scale = a_scale.data();
    args.a_scale_step = 1;
    args.b_scale = scales.back().data();
    args.b_scale_step = 1;
    args.y = outputs.back().data();
    args.y_dtype = DType::kFloat32;
    products.push_back(args);
  }
  test_threads("parallel_gemm", [&] {
    std::vector<uint8_t> bytes;
    for (Buffer<float>& y : outputs) std::memset(y.data(), 0xFF, y.size() * sizeof(float));  // NaN
    parallel_gemm(kernels.int8.run, products, m, kernels.int8.block_bytes);
    for (const Buffer<float>& y : outputs) {
      for (int64_t i = 0; i < y.size(); ++i) CHECK(!std::isnan(y[i]), "%" PRId64 " was not written", i);
      append(y.data(), y.size(), &bytes);
    }
    return bytes;
  });

  // Each product with rows of its own: the same values, and nothing in the other rows.
  std::vector<Buffer<float>> whole;
  std::vector<RowsProduct> parts;
  const Range ranges[] = {{0, m / 3}, {m / 3, m}, {0, m}};
  for (size_t i = 0; i < products.size(); ++i) {
    whole.emplace_back(outputs[i].size());
    std::memcpy(whole[i].data(), outputs[i].data(), outputs[i].size() * sizeof(float));
    parts.push_back({products[i], ranges[i]});
  }
  test_threads("parallel_gemm of rows", [&] {
    std::vector<uint8_t> bytes;
    for (Buffer<float>& y : outputs) std::memset(y.data(), 0xFF, y.size() * sizeof(float));  // NaN
    parallel_gemm(kernels.int8.run, parts, kernels.int8.block_bytes);
    for (size_t i = 0; i < parts.size(); ++i) {
      for (int64_t at = 0; at < outputs[i].size(); ++at) {
        const int64_t row = at / products[i].n;
        const bool is_own = ranges[i].begin <= row && row < ranges[i].end;
        CHECK(is_own ? same(outputs[i][at], whole[i][at]) : std::isnan(outputs[i][at]), "%" PRId64, at);
      }
      append(outputs[i].data(), outputs[i].size(), &bytes);
    }
    return bytes;
  });
}

void test_rows(const Kernels& kernels, int64_t rows, int64_t k) {
  const Buffer<float> x = random_floats(rows * k), up = random_floats(rows * k);
  Buffer<uint8_t> q(rows * k);
  Buffer<float> scale(rows);
  QuantizeArgs target{};
  target.k = target.q_stride = k;
  target.x = x.data();
  target.x_dtype = DType::kFloat32;
  target.q = q.data();
  target.q_dtype = DType::kInt8;
  target.scale = scale.data();
  ActivateArgs source{};
  source.activation = Activation::kSilu;
  source.k = k;
  source.gate = x.data();
  source.up = up.data();
  source.dtype = DType::kFloat32;
  const auto result = [&] {
    std::vector<uint8_t> bytes;
    append(q.data(), q.size(), &bytes);
    append(scale.data(), scale.size(), &bytes);
    return bytes;
  };
  test_threads("parallel_quantize", [&] {
    parallel_quantize(kernels, target, 0, rows);
    return result();
  });
  test_threads("parallel_activate_quantize", [&] {
    parallel_activate_quantize(kernels, source, target, 0, rows);
    return result();
  });
}

// A buffer that was given back is used again, by the thread that had it, whatever order they are needed in.
void test_scratch() {
  const uint8_t *large, *larger;
  {
    Scratch outer(100'000), inner(50'000), small(100);
    large = outer.data();
    CHECK(large != inner.data() && small.data() != large, "two at a time share memory");
    std::memset(outer.data(), 1, 100'000);
    std::memset(inner.data(), 2, 50'000);
    CHECK(large[99'999] == 1, "overwritten");
  }
  {
    Scratch again(90'000);
    CHECK(again.data() == large, "not kept");
  }
  {
    Scratch grown(200'000);
    larger = grown.data();
    std::memset(grown.data(), 3, 200'000);
  }
  Scratch again(200'000);
  CHECK(again.data() == larger, "not kept");
}

}  // namespace

int main() {
  for (const Isa& isa : isas()) {
    if (!why_not(isa).empty()) continue;
    const Kernels& kernels = kernels_of(isa);
    for (int64_t m : {1, 5, 33, 700}) test_products(kernels, m, 200);
    test_products(kernels, 3, 4100);
    for (int64_t rows : {1, 5, 700}) test_rows(kernels, rows, 1000);
    std::printf("%s: passed\n", isa.name);
  }
  test_scratch();
  return 0;
}
