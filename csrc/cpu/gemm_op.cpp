// prepack_weight, w8a8_gemm and w8a8_linear on the CPU.
#include <torch/csrc/stable/library.h>

#include "kernels/kernels.h"
#include "kernels/pack.h"
#include "parallel.h"
#include "scratch.h"
#include "torch_args.h"

namespace sq {
namespace {

void parallel_pack(const Tensor& b, uint8_t* packed) {
  const int64_t n = b.size(0), k = b.size(1);
  if (n == 0) return;
  const int64_t grain = div_up(kPackGrain, panel_bytes(k));
  torch::stable::parallel_for(0, panel_count(n), grain, [&](int64_t begin, int64_t end) {
    pack_panels(pointer<uint8_t>(b), n, k, kernel_dtype(b.scalar_type()), packed, {begin, end});
  });
}

Tensor prepack_weight_cpu(const Tensor& b_in) {
  check_plain_weight("prepack_weight", b_in);
  const Tensor b = as_contiguous(b_in);
  Tensor packed = empty_cpu({panel_count(b.size(0)), padded_k(b.size(1)) / 4 + 1, kPanel, 4}, b.scalar_type());
  parallel_pack(b, static_cast<uint8_t*>(packed.mutable_data_ptr()));
  return packed;
}

// Where the parts of an op's scratch buffer begin: the 8-bit activation, its scales, and the weight when it is not packed.
struct ScratchPlan {
  int64_t a_stride;
  int64_t scale_offset, weight_offset, bytes;

  explicit ScratchPlan(const GemmShape& shape) {
    a_stride = padded_k(shape.k) + kRowPad;
    scale_offset = Scratch::align(padded_rows(shape.m) * a_stride);
    weight_offset = scale_offset + Scratch::align(shape.m * static_cast<int64_t>(sizeof(float)));
    bytes = weight_offset + (shape.is_packed ? 0 : panel_count(shape.n) * panel_bytes(shape.k));
  }
};

// What both ops have in common: everything but the activation and its scale.
GemmArgs weight_args(const GemmShape& shape, const Tensor& b, const Tensor& b_scale, const OptionalTensor& bias,
                     const ScratchPlan& plan, uint8_t* scratch) {
  GemmArgs args{};
  args.n = shape.n;
  args.k = shape.k;
  args.a_stride = plan.a_stride;
  args.b = pointer<uint8_t>(b);
  args.b_dtype = kernel_dtype(b.scalar_type());
  args.b_scale = pointer<float>(b_scale);
  args.b_scale_step = b_scale.numel() == 1 ? 0 : 1;
  args.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
  args.bias_dtype = bias.has_value() ? kernel_dtype(bias->scalar_type()) : DType::kFloat32;
  if (!shape.is_packed) {
    parallel_pack(b, scratch + plan.weight_offset);
    args.b = scratch + plan.weight_offset;
  }
  return args;
}

void run_gemm(GemmArgs args, int64_t m, const Tensor& y) {
  args.y = y.mutable_data_ptr();
  args.y_dtype = kernel_dtype(y.scalar_type());
  const Kernels& kernels = current_kernels();
  parallel_gemm(args.b_dtype == DType::kInt8 ? kernels.gemm_int8 : kernels.gemm_fp8, args, m);
}

// Copies a [M, K] to rows that the kernels read.
void parallel_copy(const Tensor& a, const GemmShape& shape, uint8_t flip, int64_t stride, uint8_t* target) {
  const auto* source = pointer<uint8_t>(a);
  const int64_t k = shape.k;
  const int64_t grain = div_up(kPackGrain, std::max<int64_t>(1, k));
  if (shape.m == 0) return;
  torch::stable::parallel_for(0, shape.m, grain, [&](int64_t begin, int64_t end) {
    const uint8_t mask = flip;  // a copy: writes to target could change what the lambda refers to
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* from = source + row * k;
      uint8_t* to = target + row * stride;
      for (int64_t i = 0, count = k; i < count; ++i) to[i] = from[i] ^ mask;
    }
  });
}

Tensor w8a8_gemm_cpu(const Tensor& a_in, const Tensor& b_in, const Tensor& a_scale_in, const Tensor& b_scale_in,
                     const OptionalTensor& bias_in, ScalarType out_dtype) {
  constexpr const char* kOp = "w8a8_gemm";
  check_operand_dtypes(kOp, a_in, b_in);
  const GemmShape shape = check_gemm(kOp, "a", a_in, b_in, b_scale_in, bias_in);
  check_same_device(kOp, "a_scale", a_scale_in, "a", a_in);
  check_scale(kOp, "a_scale", a_scale_in, "M", shape.m);
  check_float(kOp, "out_dtype", out_dtype);
  const Tensor a = as_contiguous(a_in), b = as_contiguous(b_in);
  const Tensor a_scale = as_contiguous(a_scale_in), b_scale = as_contiguous(b_scale_in);
  const OptionalTensor bias = as_contiguous(bias_in);
  Tensor y = empty_cpu(replace_last(a, shape.n), out_dtype);

  const ScratchPlan plan(shape);
  Scratch scratch(plan.bytes);
  GemmArgs args = weight_args(shape, b, b_scale, bias, plan, scratch.data());
  args.a = scratch.data();
  args.a_dtype = kernel_dtype(a.scalar_type());
  args.a_scale = pointer<float>(a_scale);
  args.a_scale_step = a_scale.numel() == 1 ? 0 : 1;
  parallel_copy(a, shape, args.a_dtype == DType::kInt8 ? kOffset : 0, plan.a_stride, scratch.data());
  run_gemm(args, shape.m, y);
  return y;
}

// What the linear ops share: they differ in how the rows of the activation come about. quantize_rows(args, m) is given
// everything but the source, and fills q and scale.
template <class QuantizeRowsOf>
Tensor linear_cpu(const char* op, const GemmShape& shape, const Tensor& x, const Tensor& b_in, const Tensor& b_scale_in,
                  const OptionalTensor& bias_in, const OptionalTensor& a_scale, std::optional<ScalarType> out_dtype,
                  const QuantizeRowsOf& quantize_rows) {
  if (a_scale.has_value()) {
    check_same_device(op, "a_scale", *a_scale, "x", x);
    check_static_scale(op, "a_scale", *a_scale);
  }
  check_float(op, "out_dtype", out_dtype.value_or(x.scalar_type()));
  const Tensor b = as_contiguous(b_in), b_scale = as_contiguous(b_scale_in);
  const OptionalTensor bias = as_contiguous(bias_in);
  Tensor y = empty_cpu(replace_last(x, shape.n), out_dtype.value_or(x.scalar_type()));

  const ScratchPlan plan(shape);
  Scratch scratch(plan.bytes);
  GemmArgs args = weight_args(shape, b, b_scale, bias, plan, scratch.data());
  auto* scales = reinterpret_cast<float*>(scratch.data() + plan.scale_offset);
  QuantizeArgs quantize{};
  quantize.k = shape.k;
  quantize.q = scratch.data();
  quantize.q_stride = plan.a_stride;
  quantize.q_dtype = args.b_dtype;
  quantize.flip = args.b_dtype == DType::kInt8 ? kOffset : 0;
  quantize.scale = scales;
  quantize.static_scale = a_scale.has_value() ? static_scale_value(op, "a_scale", *a_scale) : 0.0f;
  quantize_rows(quantize, shape.m);

  args.a = scratch.data();
  args.a_dtype = args.b_dtype;
  args.a_scale = scales;
  args.a_scale_step = 1;
  run_gemm(args, shape.m, y);
  return y;
}

Tensor w8a8_linear_cpu(const Tensor& x_in, const Tensor& b, const Tensor& b_scale, const OptionalTensor& bias,
                       const OptionalTensor& a_scale, const OptionalTensor& smooth_in,
                       std::optional<ScalarType> out_dtype) {
  constexpr const char* kOp = "w8a8_linear";
  check_activation(kOp, x_in);
  const GemmShape shape = check_gemm(kOp, "x", x_in, b, b_scale, bias);
  check_smooth(kOp, smooth_in, x_in);
  const Tensor x = as_contiguous(x_in);
  const OptionalTensor smooth = as_contiguous(smooth_in);
  return linear_cpu(kOp, shape, x, b, b_scale, bias, a_scale, out_dtype, [&](QuantizeArgs args, int64_t m) {
    args.x = x.const_data_ptr();
    args.x_dtype = kernel_dtype(x.scalar_type());
    args.smooth = pointer<float>(smooth);
    parallel_quantize(current_kernels().quantize_rows, args, m);
  });
}

Tensor silu_mul_w8a8_linear_cpu(const Tensor& gate_in, const Tensor& up_in, const Tensor& b, const Tensor& b_scale,
                                const OptionalTensor& bias, const OptionalTensor& a_scale,
                                std::optional<ScalarType> out_dtype) {
  constexpr const char* kOp = "silu_mul_w8a8_linear";
  check_gate_and_up(kOp, gate_in, up_in);
  const GemmShape shape = check_gemm(kOp, "gate", gate_in, b, b_scale, bias);
  const Tensor gate = as_contiguous(gate_in), up = as_contiguous(up_in);
  return linear_cpu(kOp, shape, gate, b, b_scale, bias, a_scale, out_dtype, [&](const QuantizeArgs& args, int64_t m) {
    SiluMulArgs silu{};
    silu.k = args.k;
    silu.gate = gate.const_data_ptr();
    silu.up = up.const_data_ptr();
    silu.dtype = kernel_dtype(gate.scalar_type());
    parallel_silu_mul_quantize(current_kernels(), silu, args, m);
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CPU, m) {
  m.impl("prepack_weight", TORCH_BOX(&prepack_weight_cpu));
  m.impl("w8a8_gemm", TORCH_BOX(&w8a8_gemm_cpu));
  m.impl("w8a8_linear", TORCH_BOX(&w8a8_linear_cpu));
  m.impl("silu_mul_w8a8_linear", TORCH_BOX(&silu_mul_w8a8_linear_cpu));
}

}  // namespace sq
