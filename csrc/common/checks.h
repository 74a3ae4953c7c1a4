// Argument checks of the ops, for every device. A failure is one sentence: op, argument, what came, what was expected.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace sq {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using OptionalTensors = std::optional<std::vector<OptionalTensor>>;  // none at all, an empty list: none of them

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

// What messages call an argument: its name, or "weight[2] (down)" for an element of a list, with what it is there.
struct ArgName {
  const char* name;
  int64_t index = -1;
  const char* role = nullptr;

  ArgName(const char* argument) : name(argument) {}
  ArgName(const char* list, size_t element, const char* element_role = nullptr)
      : name(list), index(static_cast<int64_t>(element)), role(element_role) {}
};

inline std::ostream& operator<<(std::ostream& out, const ArgName& name) {
  out << name.name;
  if (name.index >= 0) out << '[' << name.index << ']';
  return name.role == nullptr ? out : out << " (" << name.role << ')';
}

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

inline void check_float(const char* op, const ArgName& name, ScalarType dtype) {
  SQ_CHECK(is_float(dtype), op, ": ", name, " is ", dtype_text(dtype), ", expected float32, bfloat16 or float16");
}

inline void check_8bit(const char* op, const ArgName& name, ScalarType dtype) {
  SQ_CHECK(is_8bit(dtype), op, ": ", name, " is ", dtype_text(dtype), ", expected int8, float8_e4m3fn or float8_e5m2");
}

inline void check_same_device(const char* op, const ArgName& name, const Tensor& tensor, const ArgName& first_name,
                              const Tensor& first) {
  const bool same = tensor.is_cpu() == first.is_cpu() && tensor.is_cuda() == first.is_cuda() &&
                    tensor.get_device_index() == first.get_device_index();
  SQ_CHECK(same, op, ": ", name, " is on another device than ", first_name);
}

inline void check_scale_dtype(const char* op, const ArgName& name, const Tensor& scale) {
  SQ_CHECK(scale.scalar_type() == ScalarType::Float, op, ": ", name, " is ", dtype_text(scale.scalar_type()),
           ", expected float32");
}

// A scale for all rows, or one a row (or column): its number of elements is 1 or `count`, its shape does not matter.
inline void check_scale(const char* op, const ArgName& name, const Tensor& scale, const char* dimension,
                        int64_t count) {
  check_scale_dtype(op, name, scale);
  const int64_t elements = scale.numel();
  SQ_CHECK(elements == 1 || elements == count, op, ": ", name, " has ", elements, " elements, expected 1 or ",
           dimension, "=", count);
}

inline void check_static_scale(const char* op, const ArgName& name, const Tensor& scale) {
  check_scale_dtype(op, name, scale);
  SQ_CHECK(scale.numel() == 1, op, ": ", name, " has ", scale.numel(), " elements, expected 1");
}

// x [..., K]: a floating-point activation.
inline void check_activation(const char* op, const Tensor& x, const ArgName& name = "x") {
  check_float(op, name, x.scalar_type());
  SQ_CHECK(x.dim() >= 1, op, ": ", name, " has no dimensions, expected [..., K]");
}

// Two tensors of the same dtype, device and shape.
inline void check_alike(const char* op, const ArgName& name, const Tensor& tensor, const ArgName& first_name,
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

// The size of the blocks of k values that a Hadamard matrix rotates, 0 for none. What kernels keep in registers, or
// exchange within a warp, is this long.
constexpr int64_t kSmallestRotation = 16, kLargestRotation = 256;
inline void check_rotate(const char* op, const ArgName& name, int64_t rotate, int64_t k) {
  const bool is_power = (rotate & (rotate - 1)) == 0;
  SQ_CHECK(rotate == 0 || (kSmallestRotation <= rotate && rotate <= kLargestRotation && is_power && k % rotate == 0),
           op, ": ", name, " is ", rotate, ", expected 0 or a power of two from ", kSmallestRotation, " to ",
           kLargestRotation, " that divides the ", k, " values of a row");
}
inline void check_rotate(const char* op, int64_t rotate, int64_t k) { check_rotate(op, "rotate", rotate, k); }

// Those of an op's inputs, in the order of their static scales; an empty list is none.
using Rotations = std::vector<int64_t>;

inline int64_t element_of(const Rotations& rotate, size_t index) { return rotate.empty() ? 0 : rotate[index]; }

inline void check_rotations(const char* op, const Rotations& rotate, size_t count) {
  SQ_CHECK(rotate.empty() || rotate.size() == count, op, ": rotate has ", rotate.size(), " elements, expected 0 or ",
           count);
}

// Elements of a [..., K] in front of its last dimension.
inline int64_t row_count(const Tensor& a) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < a.dim(); ++i) rows *= a.size(i);
  return rows;
}

}  // namespace sq
