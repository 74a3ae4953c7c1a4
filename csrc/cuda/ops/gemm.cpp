// w8a8_gemm on CUDA devices, and the product that the ops with layers in them share.
#include <torch/csrc/stable/library.h>

#include "common/gemm_checks.h"
#include "cuda/compute/cublaslt.h"
#include "cuda/compute/devices.h"
#include "cuda/compute/product.h"
#include "cuda/compute/tile_product.h"
#include "cuda/kernels/gemm.h"

namespace sq {
namespace {

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

void check_blocks(const char* op, const GemmShape& shape, int64_t blocks) {
  SQ_CHECK(blocks <= kMaxBlocks, op, ": M=", shape.m, " and N=", shape.n, " are too many for one launch");
}

// The rows of `finish` from `row` on.
Finish finish_rows(Finish finish, int64_t row, int64_t rows) {
  finish.m = rows;
  finish.a_scale += row * finish.a_scale_step;
  finish.y = static_cast<uint8_t*>(finish.y) + row * finish.n * element_size(finish.y_dtype);
  return finish;
}

Tensor widen(const Tensor& q, const Tensor& like) {
  Tensor wide = empty_like_device(like, {q.numel()}, ScalarType::BFloat16);
  launch_widen(
      {pointer<uint8_t>(q), kernel_dtype(q.scalar_type()), static_cast<BFloat16*>(wide.mutable_data_ptr()), q.numel()},
      current_stream(like));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return wide;
}

// False if cuBLASLt has no algorithm for the plan's product.
bool multiply_with_library(const char* op, const GemmPlan& plan, const Tensor& a_in, const Tensor& b_in,
                           const Finish& finish) {
  const bool is_wide = plan.path == GemmPath::kWide;
  const Tensor a = is_wide ? widen(a_in, a_in) : a_in, b = is_wide ? widen(b_in, a_in) : b_in;
  LtProduct product = plan.product;
  LtOperands operands{};
  operands.a = b.const_data_ptr();
  if (plan.path == GemmPath::kOuter) {
    operands.b = a.const_data_ptr();
    operands.a_scale = finish.b_scale;
    operands.b_scale = finish.a_scale;
    operands.bias = finish.bias;
    operands.d = finish.y;
    return lt_multiply(op, product, operands, a_in);
  }
  const bool is_int32 = product.d == LtType::kInt32;
  Tensor sums = empty_like_device(a_in, {plan.rows_together, finish.n}, is_int32 ? ScalarType::Int : ScalarType::Float);
  operands.d = sums.mutable_data_ptr();
  const int64_t row_bytes = product.depth * (is_wide ? 2 : 1);
  for (int64_t row = 0; row < finish.m; row += plan.rows_together) {
    product.columns = std::min(plan.rows_together, finish.m - row);
    operands.b = static_cast<const uint8_t*>(a.const_data_ptr()) + row * row_bytes;
    if (!lt_multiply(op, product, operands, a_in)) return false;
    launch_epilogue({operands.d, 1, is_int32, finish_rows(finish, row, product.columns)}, current_stream(a_in));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return true;
}

Tensor w8a8_gemm_cuda(const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                      const OptionalTensor& bias, ScalarType out_dtype) {
  const LayerTensors layer{b, b_scale, bias};
  const GemmShape shape = check_w8a8_gemm(a, a_scale, layer, out_dtype);
  const DeviceGuard guard(a.get_device_index());
  return multiply_cuda("w8a8_gemm", as_contiguous(a), as_contiguous(a_scale), layer, shape, out_dtype);
}

}  // namespace

Tensor multiply_cuda(const char* op, const Tensor& a, const Tensor& a_scale, const LayerTensors& layer,
                     const GemmShape& shape, ScalarType out_dtype) {
  const int device = a.get_device_index();
  const GemmRequest request = requested_gemm(op);
  if (!request.is_own) {
    require_validated(op, is_float8(layer.weight.scalar_type()) ? Family::kGemmFp8 : Family::kGemmInt8, device);
  }
  const Tensor b = as_contiguous(layer.weight), b_scale = as_contiguous(layer.scale);
  const OptionalTensor bias = as_contiguous(layer.bias);
  Tensor y = empty_like_device(a, replace_last(a, shape.n), out_dtype);
  if (y.numel() == 0) return y;

  Finish finish{};
  finish.m = shape.m;
  finish.n = shape.n;
  finish.a_scale = pointer<float>(a_scale);
  finish.b_scale = pointer<float>(b_scale);
  finish.a_scale_step = a_scale.numel() == 1 ? 0 : 1;
  finish.b_scale_step = b_scale.numel() == 1 ? 0 : 1;
  if (bias.has_value()) {
    finish.bias = bias->const_data_ptr();
    finish.bias_dtype = kernel_dtype(bias->scalar_type());
  }
  finish.y = y.mutable_data_ptr();
  finish.y_dtype = kernel_dtype(out_dtype);

  const DType a_dtype = kernel_dtype(a.scalar_type()), b_dtype = kernel_dtype(b.scalar_type());
  if (request.is_own) {
    multiply_tiles(op, request, {pointer<uint8_t>(a), pointer<uint8_t>(b), a_dtype, b_dtype, shape.k, finish}, a);
    return y;
  }

  GemmProblem problem{};
  problem.arch = device_arch(device);
  problem.m = shape.m;
  problem.n = shape.n;
  problem.k = shape.k;
  problem.a = a_dtype;
  problem.b = b_dtype;
  problem.y = finish.y_dtype;
  problem.is_aligned = is_aligned(a.const_data_ptr()) && is_aligned(b.const_data_ptr());
  problem.are_vectors_aligned = is_aligned(finish.a_scale) && is_aligned(finish.b_scale) && is_aligned(finish.bias);
  problem.a_per_row = finish.a_scale_step != 0;
  problem.b_per_column = finish.b_scale_step != 0;
  problem.has_bias = finish.bias != nullptr;
  problem.bias = finish.bias_dtype;
  GemmPlan plan = plan_gemm(problem);
  while (plan.path != GemmPath::kSkinny) {
    check_blocks(op, shape, shape.m * ((shape.n + 1023) / 1024));
    if (multiply_with_library(op, plan, a, b, finish)) return y;
    plan = plan_without_algorithm(problem, plan);
  }
  check_blocks(op, shape, skinny_blocks(shape.m, shape.n));
  launch_skinny_gemm({pointer<uint8_t>(a), pointer<uint8_t>(b), a_dtype, b_dtype, shape.k, finish}, current_stream(a));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(sq, CUDA, m) { m.impl("w8a8_gemm", TORCH_BOX(&w8a8_gemm_cuda)); }

}  // namespace sq
