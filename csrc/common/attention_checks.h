// Arguments of the ops that attend, for every device.
#pragma once

#include <cmath>

#include "common/checks.h"

namespace sq {

// k or v, or their cache: INT8 where it has scales, else of the dtype of the other argument, q or x.
inline void check_key_dtype(const char* op, const char* name, const Tensor& k, bool has_scale, const char* q_name,
                            const Tensor& q) {
  check_same_device(op, name, k, q_name, q);
  if (has_scale) {
    SQ_CHECK(k.scalar_type() == ScalarType::Char, op, ": ", name, " is ", dtype_text(k.scalar_type()),
             ", expected int8, because it has scales");
  } else {
    SQ_CHECK(k.scalar_type() == q.scalar_type(), op, ": ", name, " is ", dtype_text(k.scalar_type()), " and ", q_name,
             " is ", dtype_text(q.scalar_type()), ", expected the same dtype");
  }
}

// The scales [B, heads, length] of k [B, heads, length, D]. `layout` is "contiguous " where they have to be.
inline void check_head_scale(const char* op, const char* name, const Tensor& scale, const Tensor& k, const char* q_name,
                             const Tensor& q, const char* layout = "") {
  check_same_device(op, name, scale, q_name, q);
  check_scale_dtype(op, name, scale);
  SQ_CHECK(scale.dim() == 3 && scale.size(0) == k.size(0) && scale.size(1) == k.size(1) && scale.size(2) == k.size(2) &&
               (*layout == '\0' || scale.is_contiguous()),
           op, ": ", name, " has shape ", shape_text(scale), ", expected ", layout, "[", k.size(0), ", ", k.size(1),
           ", ", k.size(2), "]");
}

struct AttentionShape {
  int64_t batch, heads, q_len, kv_len;
};

// Which key a query may see.
inline void check_mask(const char* op, const Tensor& mask, const AttentionShape& shape, const char* q_name,
                       const Tensor& q) {
  check_same_device(op, "mask", mask, q_name, q);
  SQ_CHECK(mask.scalar_type() == ScalarType::Bool, op, ": mask is ", dtype_text(mask.scalar_type()),
           ", expected bool, true where a query may see a key");
  SQ_CHECK(mask.dim() == 4 && (mask.size(0) == 1 || mask.size(0) == shape.batch) &&
               (mask.size(1) == 1 || mask.size(1) == shape.heads) && mask.size(2) == shape.q_len &&
               mask.size(3) == shape.kv_len,
           op, ": mask has shape ", shape_text(mask), ", expected [1 or B, 1 or heads, ", shape.q_len, ", ",
           shape.kv_len, "]");
}

// What scores are multiplied by.
inline void check_score_scale(const char* op, double scale) {
  SQ_CHECK(scale > 0 && std::isfinite(scale), op, ": scale is ", scale, ", expected a positive finite number");
}

// --- the op attention ------------------------------------------------------------------------------------------------

inline void check_heads(const char* op, const char* name, const Tensor& x, const Tensor& q, bool has_scale) {
  SQ_CHECK(x.dim() == 4, op, ": ", name, " has shape ", shape_text(x), ", expected [B, heads, length, D]");
  check_key_dtype(op, name, x, has_scale, "q", q);
  SQ_CHECK(x.size(0) == q.size(0), op, ": ", name, " has B=", x.size(0), ", but q has B=", q.size(0));
}

inline void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, double scale,
                            const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  constexpr const char* op = "attention";
  const bool is_int8 = k_scale.has_value();
  SQ_CHECK(v_scale.has_value() == is_int8, op, ": ", is_int8 ? "k" : "v", "_scale is given and ", is_int8 ? "v" : "k",
           "_scale is not, expected both or neither");
  check_float(op, "q", q.scalar_type());
  check_heads(op, "q", q, q, false);
  check_heads(op, "k", k, q, is_int8);
  check_heads(op, "v", v, q, is_int8);
  SQ_CHECK(k.size(3) == q.size(3), op, ": k has D=", k.size(3), ", but q has D=", q.size(3));
  SQ_CHECK(k.size(1) == v.size(1) && k.size(2) == v.size(2), op, ": k has shape ", shape_text(k), " and v ",
           shape_text(v), ", expected the same heads and length");
  SQ_CHECK(k.size(1) > 0 ? q.size(1) % k.size(1) == 0 : q.size(1) == 0, op, ": q has ", q.size(1), " heads and k ",
           k.size(1), ", expected a multiple");
  check_score_scale(op, scale);
  if (is_int8) {
    check_head_scale(op, "k_scale", *k_scale, k, "q", q);
    check_head_scale(op, "v_scale", *v_scale, k, "q", q);
  }
  if (mask.has_value()) check_mask(op, *mask, {q.size(0), q.size(1), q.size(2), k.size(2)}, "q", q);
}

}  // namespace sq
