// attention on the CPU.
#include <torch/csrc/stable/library.h>

#include "common/attention_checks.h"
#include "common/tensors.h"
#include "cpu/compute/parallel_attention.h"

namespace sq {
namespace {

constexpr const char* kOp = "attention";

void check_heads(const char* name, const Tensor& x, const Tensor& q, bool has_scale) {
  SQ_CHECK(x.dim() == 4, kOp, ": ", name, " has shape ", shape_text(x), ", expected [B, heads, length, D]");
  check_key_dtype(kOp, name, x, has_scale, "q", q);
  SQ_CHECK(x.size(0) == q.size(0), kOp, ": ", name, " has B=", x.size(0), ", but q has B=", q.size(0));
}

void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask, double scale,
                     const OptionalTensor& k_scale, const OptionalTensor& v_scale) {
  const bool is_int8 = k_scale.has_value();
  SQ_CHECK(v_scale.has_value() == is_int8, kOp, ": ", is_int8 ? "k" : "v", "_scale is given and ", is_int8 ? "v" : "k",
           "_scale is not, expected both or neither");
  check_float(kOp, "q", q.scalar_type());
  check_heads("q", q, q, false);
  check_heads("k", k, q, is_int8);
  check_heads("v", v, q, is_int8);
  SQ_CHECK(k.size(3) == q.size(3), kOp, ": k has D=", k.size(3), ", but q has D=", q.size(3));
  SQ_CHECK(k.size(1) == v.size(1) && k.size(2) == v.size(2), kOp, ": k has shape ", shape_text(k), " and v ",
           shape_text(v), ", expected the same heads and length");
  SQ_CHECK(k.size(1) > 0 ? q.size(1) % k.size(1) == 0 : q.size(1) == 0, kOp, ": q has ", q.size(1), " heads and k ",
           k.size(1), ", expected a multiple");
  check_score_scale(kOp, scale);
  if (is_int8) {
    check_head_scale(kOp, "k_scale", *k_scale, k, "q", q);
    check_head_scale(kOp, "v_scale", *v_scale, k, "q", q);
  }
  if (mask.has_value()) check_mask(kOp, *mask, {q.size(0), q.size(1), q.size(2), k.size(2)}, "q", q);
}

// The kernels want the elements of a row side by side; how rows lie does not matter.
Tensor with_contiguous_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.size(last) <= 1 || x.stride(last) == 1 ? x : torch::stable::contiguous(x);
}

OptionalTensor with_contiguous_rows(const OptionalTensor& x) {
  return x.has_value() ? OptionalTensor(with_contiguous_rows(*x)) : OptionalTensor(std::nullopt);
}

Tensor attention_cpu(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const OptionalTensor& mask_in,
                     double scale, bool causal, const OptionalTensor& k_scale_in, const OptionalTensor& v_scale_in) {
  check_attention(q_in, k_in, v_in, mask_in, scale, k_scale_in, v_scale_in);
  const Tensor q = with_contiguous_rows(q_in), k = with_contiguous_rows(k_in), v = with_contiguous_rows(v_in);
  const OptionalTensor mask = with_contiguous_rows(mask_in);
  const OptionalTensor k_scale = with_contiguous_rows(k_scale_in), v_scale = with_contiguous_rows(v_scale_in);
  const int64_t batches = q.size(0), heads = q.size(1), kv_heads = k.size(1), q_len = q.size(2);
  Tensor y = empty_cpu({batches, q_len, heads, v.size(3)}, q.scalar_type());
  if (y.numel() == 0) return y;

  AttentionArgs args{};
  args.dtype = kernel_dtype(q.scalar_type());
  args.heads = heads;
  args.group = heads / kv_heads;
  args.q_len = q_len;
  args.kv_len = k.size(2);
  args.d = q.size(3);
  args.v_d = v.size(3);
  args.q = q.const_data_ptr();
  args.k = k.const_data_ptr();
  args.v = v.const_data_ptr();
  args.q_strides = strides_of(q);
  args.k_strides = strides_of(k);
  args.v_strides = strides_of(v);
  if (k_scale.has_value()) {
    args.k_scale = pointer<float>(*k_scale);
    args.v_scale = pointer<float>(*v_scale);
    args.k_scale_strides = strides_of(*k_scale);
    args.v_scale_strides = strides_of(*v_scale);
  }
  if (mask.has_value()) {
    args.mask = pointer<uint8_t>(*mask);
    args.mask_strides = strides_of(*mask);
  }
  args.scale = static_cast<float>(scale);
  args.causal = causal;
  args.y = y.mutable_data_ptr();

  parallel_attention(current_kernels(), args, batches);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CPU, m) { m.impl("attention", TORCH_BOX(&attention_cpu)); }

}  // namespace sq
