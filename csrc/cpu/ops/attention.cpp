// attention on the CPU.
#include <torch/csrc/stable/library.h>

#include "common/attention_checks.h"
#include "common/tensors.h"
#include "cpu/compute/parallel_attention.h"

namespace sq {
namespace {

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
