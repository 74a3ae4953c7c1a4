// Attention in plain C++, four floats at a time, and what joins the partial results of every instruction set.
#include <cmath>

#define SQ_ATTENTION_TARGET
#include "cpu/kernels/attention_body.h"

namespace sq {
namespace {

struct Portable {
  using Vec = float __attribute__((vector_size(16)));
  using Operand = float;
  using Factor = Vec;
  static constexpr int kLanes = 4, kPair = 1, kRows = 6, kVecs = 2, kDepth = kLanes, kHeight = 1, kKeys = 128,
                       kStripe = 48;

  static Vec load(const float* operands) {
    Vec value;
    __builtin_memcpy(&value, operands, sizeof value);
    return value;
  }
  static Vec broadcast(const float* operand) { return Vec{} + *operand; }
  static Vec multiply_add(Vec a, Vec b, Vec sum) { return sum + a * b; }
  static Vec exp2(Vec t) { return exp2_by_bits<Portable>(t); }
  static void store(Vec value, float* target) { __builtin_memcpy(target, &value, sizeof value); }
  static float sum(Vec value) { return (value[0] + value[2]) + (value[1] + value[3]); }
  static float most(Vec value) {
    const float even = value[0] > value[2] ? value[0] : value[2], odd = value[1] > value[3] ? value[1] : value[3];
    return even > odd ? even : odd;
  }
  static void sums(const Vec* four, float* target) {
    for (int i = 0; i < 4; ++i) target[i] = sum(four[i]);
  }
  static void transpose(const void* words, int64_t stride, int64_t count, void* target, int64_t target_stride) {
    transpose_words<4>(words, stride, count, target, target_stride);
  }
  template <class T>
  static Vec widen(const T* source) {
    return Vec{to_float(source[0]), to_float(source[1]), to_float(source[2]), to_float(source[3])};
  }
};

template <class T>
void merge(const AttentionArgs& args, const AttentionTask& task, const float* partials, int64_t parts) {
  const int64_t rows = (task.queries.end - task.queries.begin) * args.group, stride = args.v_d + 2;
  Scratch scratch(args.v_d * static_cast<int64_t>(sizeof(float)));
  auto* o = reinterpret_cast<float*>(scratch.data());
  for (int64_t row = 0; row < rows; ++row) {
    RowState state;
    for (int64_t part = 0; part < parts; ++part) {
      const float max = partials[(part * rows + row) * stride + args.v_d];
      state.max = state.max > max ? state.max : max;
    }
    for (int64_t i = 0; i < args.v_d; ++i) o[i] = 0.0f;
    for (int64_t part = 0; part < parts; ++part) {
      const float* partial = partials + (part * rows + row) * stride;
      if (partial[args.v_d] == kNothing) continue;
      const float factor = std::exp((partial[args.v_d] - state.max) * args.scale);
      state.sum += partial[args.v_d + 1] * factor;
      for (int64_t i = 0; i < args.v_d; ++i) o[i] += partial[i] * factor;
    }
    store_row<T>(args, task, row, state, o);
  }
}

void attend_portable(const AttentionArgs& args, const AttentionTask& task) {
  attend_in_dtype<Portable, Portable>(args, task);
}

}  // namespace

constexpr AttentionKernels kAttentionPortable = {"portable", attend_portable};

void merge_attention(const AttentionArgs& args, const AttentionTask& task, const float* partials, int64_t parts) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return merge<BFloat16>(args, task, partials, parts);
    case DType::kFloat16:
      return merge<Float16>(args, task, partials, parts);
    default:
      return merge<float>(args, task, partials, parts);
  }
}

}  // namespace sq
