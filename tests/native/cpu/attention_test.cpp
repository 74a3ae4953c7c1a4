// Attention of every instruction set that this machine can run, against plain loops in fp64. Buffers have exactly the sizes
// that the header promises, so that the address sanitizer sees any step outside.
#include <type_traits>
#include <vector>

#include "cpu/kernels/dispatch.h"
#include "native/testing.h"

namespace {

using namespace sq;

struct AttentionProblem {
  int64_t heads, group, q_len, kv_len, d, v_d;
  bool is_causal, has_mask;
};

template <class E>
Buffer<E> random_elements(int64_t count) {
  if constexpr (std::is_same_v<E, int8_t>) {
    Buffer<int8_t> values(count);
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<int8_t>(random_int(-127, 127));
    return values;
  } else {
    return random_values<E>(count, 1);
  }
}

// E: the elements of k and v, T or int8_t.
template <class T, class E>
void test_attention(const Kernels& kernels, const AttentionProblem& p) {
  const int64_t kv_heads = p.heads / p.group;
  constexpr bool kHasScales = std::is_same<E, int8_t>::value;
  const Buffer<T> q = random_elements<T>(p.heads * p.q_len * p.d), y(p.q_len * p.heads * p.v_d);
  const Buffer<E> k = random_elements<E>(kv_heads * p.kv_len * p.d),
                  v = random_elements<E>(kv_heads * p.kv_len * p.v_d);
  const Buffer<float> k_scale(kv_heads * p.kv_len), v_scale(kv_heads * p.kv_len);
  for (const Buffer<float>* scale : {&k_scale, &v_scale}) {
    for (int64_t i = 0; i < scale->size(); ++i) (*scale)[i] = kHasScales ? std::exp(random_float()) / 64 : 1.0f;
  }
  const Buffer<uint8_t> mask(p.q_len * p.kv_len);
  for (int64_t i = 0; i < mask.size(); ++i) mask[i] = random_int(0, 2) != 0;
  AttentionArgs args{};
  args.dtype = kDType<T>;
  args.heads = p.heads;
  args.group = p.group;
  args.q_len = p.q_len;
  args.kv_len = p.kv_len;
  args.d = p.d;
  args.v_d = p.v_d;
  args.q = q.data();
  args.k = k.data();
  args.v = v.data();
  args.q_strides = {0, p.q_len * p.d, p.d};
  args.k_strides = {0, p.kv_len * p.d, p.d};
  args.v_strides = {0, p.kv_len * p.v_d, p.v_d};
  if (kHasScales) {
    args.k_scale = k_scale.data();
    args.v_scale = v_scale.data();
    args.k_scale_strides = args.v_scale_strides = {0, p.kv_len, 1};
  }
  args.mask = p.has_mask ? mask.data() : nullptr;
  args.mask_strides = {0, 0, p.kv_len};
  args.scale = 0.3f;
  args.causal = p.is_causal;
  args.y = y.data();
  const int64_t rows = p.q_len * p.group, parts = div_up(p.kv_len, kAttentionChunk);
  for (int64_t head = 0; head < kv_heads; ++head) {
    AttentionTask task{0, head, {0, p.q_len}, {0, p.kv_len}, nullptr};
    if (rows > kAttentionDirectRows) {
      kernels.attention.run(args, task);
      continue;
    }
    const Buffer<float> partials(parts * rows * (p.v_d + 2));
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t first = part * kAttentionChunk;
      task.keys = {first, first + kAttentionChunk < p.kv_len ? first + kAttentionChunk : p.kv_len};
      task.partial = partials.data() + part * rows * (p.v_d + 2);
      kernels.attention.run(args, task);
    }
    task.partial = nullptr;
    merge_attention(args, task, partials.data(), parts);
  }

  std::vector<double> weights(p.kv_len);
  for (int64_t head = 0; head < p.heads; ++head) {
    for (int64_t i = 0; i < p.q_len; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < p.kv_len; ++j) {
        double score = 0;
        for (int64_t c = 0; c < p.d; ++c) {
          score += static_cast<double>(to_float(q[(head * p.q_len + i) * p.d + c])) *
                   to_float(k[(head / p.group * p.kv_len + j) * p.d + c]);
        }
        score *= k_scale[head / p.group * p.kv_len + j];
        const bool is_seen = (!p.is_causal || j <= i + p.kv_len - p.q_len) && (!p.has_mask || mask[i * p.kv_len + j]);
        weights[j] = is_seen ? std::exp(score * args.scale) : 0.0;
        sum += weights[j];
      }
      for (int64_t c = 0; c < p.v_d; ++c) {
        double expected = 0, largest = 0;
        for (int64_t j = 0; j < p.kv_len && sum > 0; ++j) {
          const int64_t key = head / p.group * p.kv_len + j;
          const double value = static_cast<double>(to_float(v[key * p.v_d + c])) * v_scale[key];
          expected += weights[j] / sum * value;
          largest = std::fmax(largest, std::fabs(value));
        }
        // Weights rounded to bf16 at worst, and one cast to T, whose last bit is worth at most 2^-8.
        const double bound = (kDType<T> == DType::kBFloat16 ? 0x1p-8 : 1e-4) * largest +
                             (kDType<T> == DType::kFloat32 ? 0 : 0x1p-8 * std::fabs(expected)) + 1e-6;
        const double error = std::fabs(to_float(y[(i * p.heads + head) * p.v_d + c]) - expected);
        CHECK(error <= bound, "[%" PRId64 ", %" PRId64 ", %" PRId64 "]: off by %g, allowed %g", i, head, c, error,
              bound);
      }
    }
  }
}

void test_attention(const Kernels& kernels) {
  const AttentionProblem problems[] = {
      {4, 2, 1, 1, 1, 1, false, false},     {6, 3, 1, 300, 15, 33, true, true},    {2, 1, 16, 257, 64, 64, true, false},
      {3, 3, 40, 40, 64, 64, true, false},  {2, 2, 100, 130, 31, 65, true, true},  {1, 1, 17, 9, 520, 8, true, false},
      {2, 1, 60, 129, 16, 96, false, true}, {8, 8, 24, 128, 128, 128, true, true},
  };
  for (const AttentionProblem& problem : problems) {
    test_attention<float, float>(kernels, problem);
    test_attention<BFloat16, BFloat16>(kernels, problem);
    test_attention<Float16, Float16>(kernels, problem);
    test_attention<float, int8_t>(kernels, problem);
    test_attention<BFloat16, int8_t>(kernels, problem);
    test_attention<Float16, int8_t>(kernels, problem);
  }
}

}  // namespace

int main() {
  for (const Isa& isa : isas()) {
    if (!why_not(isa).empty()) {
      std::printf("%s: skipped, %s\n", isa.name, why_not(isa).c_str());
      continue;
    }
    test_attention(kernels_of(isa));
    std::printf("%s: passed\n", isa.name);
  }
  return 0;
}
