// The product of 8-bit matrices: a plan, then cuBLASLt, the kernel for few rows, or our own tiles.
#include "cuda/compute/product.h"

#include "cuda/compute/cublaslt.h"
#include "cuda/compute/devices.h"
#include "cuda/compute/tile_product.h"
#include "cuda/kernels/gemm.h"

namespace sq {
namespace {

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

void check_blocks(const char* op, const GemmShape& shape, int64_t blocks) {
  SQ_CHECK(blocks <= kMaxBlocks, op, ": M=", shape.m, " and N=", shape.n, " are too many for one launch");
}

// The rows of `epilogue` from `row` on.
Epilogue epilogue_rows(Epilogue epilogue, int64_t row, int64_t rows) {
  epilogue.m = rows;
  epilogue.a_scale += row * epilogue.a_scale_step;
  const int64_t bytes = row * epilogue.n * element_size(epilogue.y_dtype);
  epilogue.y = static_cast<uint8_t*>(epilogue.y) + bytes;
  if (epilogue.residual != nullptr) epilogue.residual = static_cast<const uint8_t*>(epilogue.residual) + bytes;
  return epilogue;
}

Tensor widen(const Tensor& q, const Tensor& like) {
  Tensor wide = empty_like_device(like, {q.numel()}, ScalarType::BFloat16);
  launch_widen(
      {pointer<uint8_t>(q), kernel_dtype(q.scalar_type()), static_cast<BFloat16*>(wide.mutable_data_ptr()), q.numel()},
      current_stream(like));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return wide;
}

// What a product lacks that did not go through our epilogue.
void add_residual(const Epilogue& epilogue, const Tensor& like) {
  launch_add_residual(epilogue, current_stream(like));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// False if cuBLASLt has no algorithm for the plan's product.
bool multiply_with_library(const char* op, const GemmPlan& plan, const Tensor& a_in, const Tensor& b_in,
                           const Epilogue& epilogue) {
  const bool is_wide = plan.path == GemmPath::kWide;
  const Tensor a = is_wide ? widen(a_in, a_in) : a_in, b = is_wide ? widen(b_in, a_in) : b_in;
  LtProduct product = plan.product;
  LtOperands operands{};
  operands.a = b.const_data_ptr();
  if (plan.path == GemmPath::kOuter) {
    operands.b = a.const_data_ptr();
    operands.a_scale = epilogue.b_scale;
    operands.b_scale = epilogue.a_scale;
    operands.bias = epilogue.bias;
    operands.d = epilogue.y;
    if (!lt_multiply(op, product, operands, a_in)) return false;
    add_residual(epilogue, a_in);
    return true;
  }
  const bool is_int32 = product.d == LtType::kInt32;
  Tensor sums =
      empty_like_device(a_in, {plan.rows_together, epilogue.n}, is_int32 ? ScalarType::Int : ScalarType::Float);
  operands.d = sums.mutable_data_ptr();
  const int64_t row_bytes = product.depth * (is_wide ? 2 : 1);
  for (int64_t row = 0; row < epilogue.m; row += plan.rows_together) {
    product.columns = std::min(plan.rows_together, epilogue.m - row);
    operands.b = static_cast<const uint8_t*>(a.const_data_ptr()) + row * row_bytes;
    if (!lt_multiply(op, product, operands, a_in)) return false;
    launch_epilogue({operands.d, 1, is_int32, epilogue_rows(epilogue, row, product.columns)}, current_stream(a_in));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
  return true;
}

}  // namespace

Tensor multiply_cuda(const char* op, const Tensor& a, const Tensor& a_scale, const LayerTensors& layer,
                     const GemmShape& shape, ScalarType out_dtype, const OptionalTensor& residual) {
  const int device = a.get_device_index();
  const GemmRequest request = requested_gemm(op);
  if (!request.is_own) {
    require_validated(op, is_float8(layer.weight.scalar_type()) ? Family::kGemmFp8 : Family::kGemmInt8, device);
  }
  const Tensor b = as_contiguous(layer.weight), b_scale = as_contiguous(layer.scale);
  const OptionalTensor bias = as_contiguous(layer.bias);
  Tensor y = empty_like_device(a, replace_last(a, shape.n), out_dtype);
  if (y.numel() == 0) return y;

  Epilogue epilogue{};
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
  epilogue.y = y.mutable_data_ptr();
  epilogue.y_dtype = kernel_dtype(out_dtype);
  epilogue.residual = pointer<void>(residual);

  const DType a_dtype = kernel_dtype(a.scalar_type()), b_dtype = kernel_dtype(b.scalar_type());
  if (request.is_own) {
    Epilogue without_residual = epilogue;  // the tile kernels know of none
    without_residual.residual = nullptr;
    multiply_tiles(op, request,
                   {pointer<uint8_t>(a), pointer<uint8_t>(b), a_dtype, b_dtype, shape.k, without_residual}, a);
    add_residual(epilogue, a);
    return y;
  }

  GemmProblem problem{};
  problem.arch = device_arch(device);
  problem.m = shape.m;
  problem.n = shape.n;
  problem.k = shape.k;
  problem.a = a_dtype;
  problem.b = b_dtype;
  problem.y = epilogue.y_dtype;
  problem.is_aligned = is_aligned(a.const_data_ptr()) && is_aligned(b.const_data_ptr());
  problem.are_vectors_aligned =
      is_aligned(epilogue.a_scale) && is_aligned(epilogue.b_scale) && is_aligned(epilogue.bias);
  problem.a_per_row = epilogue.a_scale_step != 0;
  problem.b_per_column = epilogue.b_scale_step != 0;
  problem.has_bias = epilogue.bias != nullptr;
  problem.bias = epilogue.bias_dtype;
  GemmPlan plan = plan_gemm(problem);
  while (plan.path != GemmPath::kSkinny) {
    check_blocks(op, shape, shape.m * ((shape.n + 1023) / 1024));
    if (multiply_with_library(op, plan, a, b, epilogue)) return y;
    plan = plan_without_algorithm(problem, plan);
  }
  check_blocks(op, shape, skinny_blocks(shape.m, shape.n));
  launch_skinny_gemm({pointer<uint8_t>(a), pointer<uint8_t>(b), a_dtype, b_dtype, shape.k, epilogue},
                     current_stream(a));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return y;
}

}  // namespace sq
