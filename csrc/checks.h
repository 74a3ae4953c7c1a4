// Argument checks of the ops, for every device. A failure is one sentence: op, argument, what came, what was expected.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace sq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

// A macro, so that the sentence's parts are evaluated only when it is needed.
#define SQ_CHECK(condition, ...)               \
  do {                                         \
    if (!(condition)) ::sq::fail(__VA_ARGS__); \
  } while (false)

// |sum| <= K * 127 * 127 < 2^31 up to here.
constexpr int64_t kMaxInt8K = 133144;
constexpr int64_t kPackedColumns = 64;  // of one panel of a packed weight, see cpu/kernels/pack.h

inline std::string dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float:
      return "float32";
    case ScalarType::BFloat16:
      return "bfloat16";
    case ScalarType::Half:
      return "float16";
    case ScalarType::Double:
      return "float64";
    case ScalarType::Char:
      return "int8";
    case ScalarType::Byte:
      return "uint8";
    case ScalarType::Int:
      return "int32";
    case ScalarType::Long:
      return "int64";
    case ScalarType::Float8_e4m3fn:
      return "float8_e4m3fn";
    case ScalarType::Float8_e5m2:
      return "float8_e5m2";
    default:
      return torch::headeronly::toString(dtype);
  }
}

inline std::string shape_text(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(tensor.size(i));
  return text + "]";
}

inline bool is_float8(ScalarType dtype) {
  return dtype == ScalarType::Float8_e4m3fn || dtype == ScalarType::Float8_e5m2;
}
inline bool is_8bit(ScalarType dtype) { return dtype == ScalarType::Char || is_float8(dtype); }
inline bool is_float(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
}

inline void check_float(const char* op, const char* name, ScalarType dtype) {
  SQ_CHECK(is_float(dtype), op, ": ", name, " is ", dtype_text(dtype), ", expected float32, bfloat16 or float16");
}

inline void check_8bit(const char* op, const char* name, ScalarType dtype) {
  SQ_CHECK(is_8bit(dtype), op, ": ", name, " is ", dtype_text(dtype), ", expected int8, float8_e4m3fn or float8_e5m2");
}

inline void check_same_device(const char* op, const char* name, const Tensor& tensor, const char* first_name,
                              const Tensor& first) {
  const bool same = tensor.is_cpu() == first.is_cpu() && tensor.is_cuda() == first.is_cuda() &&
                    tensor.get_device_index() == first.get_device_index();
  SQ_CHECK(same, op, ": ", name, " is on another device than ", first_name);
}

inline void check_scale_dtype(const char* op, const char* name, const Tensor& scale) {
  SQ_CHECK(scale.scalar_type() == ScalarType::Float, op, ": ", name, " is ", dtype_text(scale.scalar_type()),
           ", expected float32");
}

// A scale for all rows, or one a row (or column): its number of elements is 1 or `count`, its shape does not matter.
inline void check_scale(const char* op, const char* name, const Tensor& scale, const char* dimension, int64_t count) {
  check_scale_dtype(op, name, scale);
  const int64_t elements = scale.numel();
  SQ_CHECK(elements == 1 || elements == count, op, ": ", name, " has ", elements, " elements, expected 1 or ",
           dimension, "=", count);
}

inline void check_static_scale(const char* op, const char* name, const Tensor& scale) {
  check_scale_dtype(op, name, scale);
  SQ_CHECK(scale.numel() == 1, op, ": ", name, " has ", scale.numel(), " elements, expected 1");
}

// x [..., K]: a floating-point activation.
inline void check_activation(const char* op, const Tensor& x, const char* name = "x") {
  check_float(op, name, x.scalar_type());
  SQ_CHECK(x.dim() >= 1, op, ": ", name, " has no dimensions, expected [..., K]");
}

// Two tensors of the same dtype, device and shape.
inline void check_alike(const char* op, const char* name, const Tensor& tensor, const char* first_name,
                        const Tensor& first) {
  SQ_CHECK(tensor.scalar_type() == first.scalar_type(), op, ": ", first_name, " is ", dtype_text(first.scalar_type()),
           " and ", name, " is ", dtype_text(tensor.scalar_type()), ", expected the same dtype");
  check_same_device(op, name, tensor, first_name, first);
  SQ_CHECK(shape_text(first) == shape_text(tensor), op, ": ", first_name, " has shape ", shape_text(first), " and ",
           name, " ", shape_text(tensor), ", expected the same shape");
}

inline void check_smooth(const char* op, const OptionalTensor& smooth, const Tensor& x) {
  if (!smooth.has_value()) return;
  const int64_t k = x.size(x.dim() - 1);
  check_same_device(op, "smooth", *smooth, "x", x);
  check_scale_dtype(op, "smooth", *smooth);
  SQ_CHECK(smooth->numel() == k, op, ": smooth has ", smooth->numel(), " elements, expected K=", k);
}

inline void check_exact_sums(const char* op, const Tensor& b, int64_t k) {
  SQ_CHECK(b.scalar_type() != ScalarType::Char || k <= kMaxInt8K, op, ": K is ", k,
           ", and int32 sums of int8 products are exact only up to K=", kMaxInt8K);
}

// b [N, K] or [E, N, K] alone, as prepack_weight takes it.
inline void check_plain_weight(const char* op, const Tensor& b) {
  check_8bit(op, "b", b.scalar_type());
  SQ_CHECK(b.dim() == 2 || b.dim() == 3, op, ": b has shape ", shape_text(b), ", expected [N, K] or [E, N, K]");
  check_exact_sums(op, b, b.size(b.dim() - 1));
}

struct GemmShape {
  int64_t m, n, k;
  bool is_packed;
};

// Elements of a [..., K] in front of its last dimension.
inline int64_t row_count(const Tensor& a) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < a.dim(); ++i) rows *= a.size(i);
  return rows;
}

// What a product's operands are called in messages.
struct OperandNames {
  const char* a = "a";
  const char* b = "b";
  const char* b_scale = "b_scale";
  const char* bias = "bias";
};

// What prepack_weight makes of [N, K], or of [E, N, K], for an activation of k values and scales of n columns.
inline void check_packed(const char* op, const OperandNames& names, const Tensor& a, int64_t k, const Tensor& b,
                         int64_t n) {
  const int64_t first = b.dim() - 4;
  SQ_CHECK(a.is_cpu(), op, ": ", names.b, " is packed for the CPU kernels, expected ", first == 0 ? "" : "E times ",
           "[N, K] on this device");
  SQ_CHECK(b.size(first + 2) == kPackedColumns && b.size(first + 3) == 4 && b.size(first + 1) % 16 == 1, op, ": ",
           names.b, " has shape ", shape_text(b), ", expected [N, K] or what prepack_weight returns");
  const int64_t most_n = b.size(first) * kPackedColumns;
  const int64_t most_k = b.size(first + 1) / 16 * 64;
  SQ_CHECK(most_n - kPackedColumns < n && n <= most_n, op, ": ", names.b_scale, " has ", n,
           " elements, expected one a column of the packed ", names.b, ", which has ", most_n - kPackedColumns + 1,
           " to ", most_n);
  SQ_CHECK(most_k - 64 < k && k <= most_k, op, ": ", names.a, " has K=", k, ", but the packed ", names.b,
           " has K=", most_k - 63, " to ", most_k);
}

// The operands of a product of m rows of k values, on the device of `a` and checked for their own dtype already, with the
// weight b, plain or packed.
inline GemmShape check_weight(const char* op, const OperandNames& names, const Tensor& a, int64_t m, int64_t k,
                              const Tensor& b, const Tensor& b_scale, const OptionalTensor& bias) {
  check_8bit(op, names.b, b.scalar_type());
  check_same_device(op, names.b, b, names.a, a);
  check_same_device(op, names.b_scale, b_scale, names.a, a);
  GemmShape shape{m, 0, k, b.dim() == 4};
  if (shape.is_packed) {
    check_scale_dtype(op, names.b_scale, b_scale);
    shape.n = b_scale.numel();
    check_packed(op, names, a, k, b, shape.n);
  } else {
    SQ_CHECK(b.dim() == 2, op, ": ", names.b, " has shape ", shape_text(b),
             ", expected [N, K] or what prepack_weight returns");
    shape.n = b.size(0);
    SQ_CHECK(b.size(1) == shape.k, op, ": ", names.a, " has K=", shape.k, ", but ", names.b, " has K=", b.size(1));
    check_scale(op, names.b_scale, b_scale, "N", shape.n);
  }
  check_exact_sums(op, b, shape.k);
  if (bias.has_value()) {
    check_same_device(op, names.bias, *bias, names.a, a);
    check_float(op, names.bias, bias->scalar_type());
    SQ_CHECK(bias->numel() == shape.n, op, ": ", names.bias, " has ", bias->numel(), " elements, expected N=", shape.n);
  }
  return shape;
}

// The same for the rows of a [..., K].
inline GemmShape check_gemm(const char* op, const OperandNames& names, const Tensor& a, const Tensor& b,
                            const Tensor& b_scale, const OptionalTensor& bias) {
  SQ_CHECK(a.dim() >= 1, op, ": ", names.a, " has no dimensions, expected [..., K]");
  return check_weight(op, names, a, row_count(a), a.size(a.dim() - 1), b, b_scale, bias);
}

// The 8-bit operands agree: INT8 with INT8, either fp8 with either fp8.
inline void check_operand_dtypes(const char* op, const Tensor& a, const Tensor& b) {
  check_8bit(op, "a", a.scalar_type());
  check_8bit(op, "b", b.scalar_type());
  SQ_CHECK(is_float8(a.scalar_type()) == is_float8(b.scalar_type()), op, ": a is ", dtype_text(a.scalar_type()),
           " and b is ", dtype_text(b.scalar_type()), ", expected both int8 or both float8");
}

}  // namespace sq
