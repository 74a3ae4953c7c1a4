#include "cuda/compute/decoder_attention.h"

#include "cuda/compute/scaled_dot_product.h"
#include "cuda/compute/views.h"
#include "cuda/kernels/decoder_layer.h"

namespace sq {
namespace {

HeadRows head_rows(const Tensor& x) {
  return {x.const_data_ptr(), x.is_contiguous() ? x.size(x.dim() - 1) : x.stride(x.dim() - 2)};
}

HeadNorm head_norm(const OptionalTensor& weight) {
  if (!weight.has_value()) return {nullptr, DType::kFloat32};
  return {weight->const_data_ptr(), kernel_dtype(weight->scalar_type())};
}

CacheRows cache_rows(const Tensor& buffer, const OptionalTensor& scale) {
  return {buffer.mutable_data_ptr(), scale.has_value() ? static_cast<float*>(scale->mutable_data_ptr()) : nullptr,
          buffer.size(2)};
}

// Strides of a mask; 0 along a dimension that all share.
int64_t mask_stride(const Tensor& mask, int64_t dim) { return mask.size(dim) == 1 ? 0 : mask.stride(dim); }

// All but y.
MaskJob mask_job(const DecoderArguments& arguments, const HeadCounts& counts, const AttentionPlan& plan) {
  MaskJob job{};
  job.length = arguments.length();
  job.step = (job.length + kMaskColumns - 1) / kMaskColumns * kMaskColumns;
  job.causal = arguments.causal;
  job.group = job.batches = 1;
  job.heads = plan.is_folded ? counts.sharing() : 1;
  if (!arguments.mask.has_value()) return job;
  const Tensor& mask = *arguments.mask;
  job.visible = static_cast<const uint8_t*>(mask.const_data_ptr());
  const int64_t of_head = mask_stride(mask, 1);
  job.strides[0] = mask_stride(mask, 0);
  job.strides[2] = of_head;
  job.strides[3] = mask_stride(mask, 2);
  job.strides[4] = mask_stride(mask, 3);
  if (!plan.is_folded) {
    job.batches = mask.size(0);
    job.heads = mask.size(1);
  } else if (mask.size(0) > 1 || mask.size(1) > 1) {
    job.batches = counts.batch * counts.kv_heads;
    job.group = counts.kv_heads;
    job.strides[1] = of_head * counts.sharing();
  }
  return job;
}

// Keys or values as the attention reads them: heads of `length` tokens, `room` apart.
Tensor read_heads(const Tensor& memory, const HeadCounts& counts, const AttentionPlan& plan, int64_t length,
                  int64_t room) {
  const int64_t d = counts.d, heads = counts.kv_heads * std::max<int64_t>(1, plan.copies);
  if (plan.is_folded) return view_of(memory, {counts.batch * heads, 1, length, d}, {room * d, room * d, d, 1});
  return view_of(memory, {counts.batch, heads, length, d}, {heads * room * d, room * d, d, 1});
}

}  // namespace

AttentionPlan plan_attention(const DecoderArguments& arguments, const HeadCounts& counts) {
  const bool is_one = counts.time == 1, is_shared = counts.sharing() > 1;
  AttentionPlan plan{};
  // torch's causal attention begins with the first key, so that only the first tokens can use it.
  plan.has_mask = arguments.mask.has_value() || arguments.positions.has_value() ||
                  (arguments.causal && !is_one && arguments.past > 0);
  plan.is_causal = arguments.causal && !is_one && !plan.has_mask;
  plan.is_folded = plan.has_mask && is_one && is_shared;
  plan.enable_gqa = !plan.has_mask && is_shared;
  const bool is_repeated = plan.has_mask && !is_one && is_shared;
  plan.copies = is_repeated ? counts.sharing() : arguments.keys_scale.has_value() ? 1 : 0;
  return plan;
}

Tensor attend_cuda(const char* op, const DecoderArguments& arguments, const HeadCounts& counts,
                   const std::vector<Tensor>& qkv, double offset, double head_eps) {
  const Tensor& x = arguments.x;
  const ScalarType dtype = x.scalar_type();
  const AttentionPlan plan = plan_attention(arguments, counts);
  const auto [batch, time, heads, kv_heads, d] = counts;
  const Tensor cos = as_contiguous(arguments.cos), sin = as_contiguous(arguments.sin);
  const OptionalTensor q_norm = as_contiguous(arguments.q_norm), k_norm = as_contiguous(arguments.k_norm);
  const OptionalTensor positions = as_contiguous(arguments.positions);
  const Tensor rotated_q = empty_like_device(x, {batch, time, heads, d}, dtype);

  AppendJob job{};
  job.dtype = kernel_dtype(dtype);
  job.batch = batch;
  job.time = time;
  job.heads = heads;
  job.kv_heads = kv_heads;
  job.d = d;
  job.q = head_rows(qkv[kQ]);
  job.k = head_rows(qkv[kK]);
  job.v = head_rows(qkv[kV]);
  job.q_norm = head_norm(q_norm);
  job.k_norm = head_norm(k_norm);
  job.norm_offset = static_cast<float>(offset);
  job.eps = static_cast<float>(head_eps);
  job.cos = cos.const_data_ptr();
  job.sin = sin.const_data_ptr();
  job.angle_batch = cos.size(0) == 1 ? 0 : time * d;
  job.past = arguments.past;
  job.positions = pointer<int64_t>(positions);
  job.rotated_q = rotated_q.mutable_data_ptr();
  job.keys = cache_rows(arguments.keys, arguments.keys_scale);
  job.values = cache_rows(arguments.values, arguments.values_scale);
  OptionalTensor mask;
  if (plan.has_mask) {
    job.mask = mask_job(arguments, counts, plan);
    const MaskJob& own = job.mask;
    const int64_t rows = plan.is_folded ? own.heads : time, mask_heads = plan.is_folded ? 1 : own.heads;
    const Tensor padded = empty_like_device(x, {own.batches, mask_heads, rows, own.step}, dtype);
    job.mask.y = padded.mutable_data_ptr();
    mask = columns_of(padded, 0, own.length);
  }
  SQ_CHECK(append_blocks(job) <= kMaxBlocks, op, ": B=", batch, ", T=", time, " and ", arguments.length(),
           " keys are too many for one launch");
  launch_append(job, current_stream(x));
  STD_CUDA_KERNEL_LAUNCH_CHECK();

  const int64_t length = arguments.length();
  int64_t keys_room = job.keys.room, values_room = job.values.room;
  Tensor keys = arguments.keys, values = arguments.values;
  if (plan.copies > 0) {
    keys = empty_like_device(x, {batch, kv_heads * plan.copies, length, d}, dtype);
    values = empty_like_device(x, {batch, kv_heads * plan.copies, length, d}, dtype);
    launch_cache_copy({job.dtype, batch, kv_heads, length, d, plan.copies, job.keys, job.values,
                       keys.mutable_data_ptr(), values.mutable_data_ptr()},
                      current_stream(x));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
    keys_room = values_room = length;
  }
  const Tensor q = plan.is_folded ? view_of(rotated_q, {batch * kv_heads, 1, counts.sharing(), d})
                                  : view_of(rotated_q, {batch, heads, time, d}, {time * heads * d, d, heads * d, 1});
  const Tensor y = scaled_dot_product_attention({q, read_heads(keys, counts, plan, length, keys_room),
                                                 read_heads(values, counts, plan, length, values_room), mask,
                                                 plan.is_causal, arguments.scale, plan.enable_gqa});
  // Fast kernels write [B, T, H, D] already; a folded result lies as it should in any case.
  return view_of(as_contiguous(plan.is_folded ? y : torch::stable::transpose(y, 1, 2)), {batch, time, heads * d});
}

}  // namespace sq
