// The product of 8-bit matrices: ways to multiply, tried in the order that was measured on this machine.
#include "cuda/compute/product.h"

#include "cuda/compute/library_product.h"
#include "cuda/compute/tile_product.h"
#include "cuda/compute/torch_product.h"
#include "cuda/compute/ways.h"
#include "cuda/kernels/gemm.h"

namespace sq {
namespace {

Refusal multiply_by_few_rows(ProductJob& job, const Rows& rows) {
  const TileJob part = job.of_rows(rows);
  if (skinny_blocks(part.epilogue.m, part.epilogue.n) > kMaxBlocks) {
    return {{rows},
            "M=" + std::to_string(part.epilogue.m) + " and N=" + std::to_string(part.epilogue.n) +
                " are too many for one launch"};
  }
  launch_skinny_gemm({part.a, part.b, part.a_dtype, part.b_dtype, part.k, part.epilogue}, current_stream(job.a));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return {};
}

Refusal multiply_by(Way way, ProductJob& job, const Rows& rows) {
  switch (way) {
    case Way::kLibrary:
      return multiply_by_library(job, rows, false);
    case Way::kLibraryFast:
      return multiply_by_library(job, rows, true);
    case Way::kSkinny:
      return multiply_by_few_rows(job, rows);
    case Way::kMma:
      return multiply_by_tiles(job, rows, GemmFamily::kMma);
    case Way::kWgmma:
      return multiply_by_tiles(job, rows, GemmFamily::kWgmma);
    default:
      return multiply_by_torch(job, rows);
  }
}

// Each way gets the rows that those before it refused.
void multiply_by_ways(ProductJob& job, int64_t m, const Ways& ways) {
  Refusal left{{{0, m}}, ""};
  for (Way way : ways.list) {
    Refusal next;
    for (const Rows& rows : left.rows) {
      Refusal refusal = multiply_by(way, job, rows);
      next.rows.insert(next.rows.end(), refusal.rows.begin(), refusal.rows.end());
      if (!refusal.reason.empty()) next.reason = std::move(refusal.reason);
    }
    if (next.rows.empty()) return;
    left = std::move(next);
  }
  const std::string text = text_of(ways.list);
  SQ_CHECK(!ways.is_forced, job.op, ": SMOOTHQUANT_CUDA_GEMM is ", text, ", but ", left.reason);
  fail(job.op, ": no way of ", text, " can multiply this: ", left.reason);
}

}  // namespace

Tensor multiply_cuda(const char* op, const Tensor& a, const Tensor& a_scale, const LayerTensors& layer,
                     const GemmShape& shape, ScalarType out_dtype, const OptionalTensor& residual) {
  const Tensor b = as_contiguous(layer.weight), b_scale = as_contiguous(layer.scale);
  const OptionalTensor bias = as_contiguous(layer.bias);
  ProductJob job{op, a, b, a_scale, b_scale, bias, out_dtype, {}, std::nullopt};
  TileJob& pointers = job.pointers;
  pointers.a = pointer<uint8_t>(a);
  pointers.b = pointer<uint8_t>(b);
  pointers.a_dtype = kernel_dtype(a.scalar_type());
  pointers.b_dtype = kernel_dtype(b.scalar_type());
  pointers.k = shape.k;
  Epilogue& epilogue = pointers.epilogue;
  epilogue.m = shape.m;
  epilogue.n = shape.n;
  epilogue.a_scale = pointer<float>(a_scale);
  epilogue.b_scale = pointer<float>(b_scale);
  epilogue.a_scale_step = a_scale.numel() == 1 ? 0 : 1;
  epilogue.b_scale_step = b_scale.numel() == 1 ? 0 : 1;
  if (bias.has_value()) {
    epilogue.bias = bias->const_data_ptr();
    epilogue.bias_dtype = kernel_dtype(bias->scalar_type());
  }
  epilogue.y_dtype = kernel_dtype(out_dtype);
  epilogue.residual = pointer<void>(residual);
  if (shape.m > 0 && shape.n > 0) multiply_by_ways(job, shape.m, ways_for(op, pointers.a_dtype, shape.m));
  return job.result();
}

}  // namespace sq
