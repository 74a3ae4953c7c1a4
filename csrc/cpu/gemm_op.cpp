// prepack_weight, w8a8_gemm, w8a8_linear and silu_mul_w8a8_linear on the CPU.
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
  const auto* source = pointer<uint8_t>(b);
  const DType dtype = kernel_dtype(b.scalar_type());
  parallel_rows(panel_count(n), panel_bytes(k),
                [&](Range panels) { pack_panels(source, n, k, dtype, packed, panels); });
}

Tensor prepack_weight_cpu(const Tensor& b_in) {
  check_plain_weight("prepack_weight", b_in);
  const Tensor b = as_contiguous(b_in);
  Tensor packed = empty_cpu({panel_count(b.size(0)), padded_k(b.size(1)) / 4 + 1, kPanel, 4}, b.scalar_type());
  parallel_pack(b, static_cast<uint8_t*>(packed.mutable_data_ptr()));
  return packed;
}

// One product: its scratch buffer, which holds the 8-bit activation, its scales, for fp8 the widened activation, and the
// weight when it does not come packed.
class Product {
 public:
  Product(const GemmShape& shape, const Tensor& b, const Tensor& b_scale, const OptionalTensor& bias)
      : shape_(shape),
        kernels_(current_kernels()),
        is_int8_(b.scalar_type() == ScalarType::Char),
        q_stride_(padded_k(shape.k) + kRowPad),
        wide_stride_(is_int8_ ? 0 : padded_k(shape.k) * kernels_.fp8_element_size + kRowPad),
        scale_offset_(Scratch::align(padded_rows(shape.m) * q_stride_)),
        wide_offset_(scale_offset_ + Scratch::align(shape.m * static_cast<int64_t>(sizeof(float)))),
        weight_offset_(wide_offset_ + Scratch::align(padded_rows(shape.m) * wide_stride_)),
        scratch_(weight_offset_ + (shape.is_packed ? 0 : panel_count(shape.n) * panel_bytes(shape.k))) {
    args_.n = shape.n;
    args_.k = shape.k;
    args_.b = pointer<uint8_t>(b);
    args_.b_dtype = kernel_dtype(b.scalar_type());
    args_.b_scale = pointer<float>(b_scale);
    args_.b_scale_step = b_scale.numel() == 1 ? 0 : 1;
    args_.bias = bias.has_value() ? bias->const_data_ptr() : nullptr;
    args_.bias_dtype = bias.has_value() ? kernel_dtype(bias->scalar_type()) : DType::kFloat32;
    if (!shape.is_packed) {
      parallel_pack(b, scratch_.data() + weight_offset_);
      args_.b = scratch_.data() + weight_offset_;
    }
  }

  uint8_t* q() { return scratch_.data(); }
  int64_t q_stride() const { return q_stride_; }
  uint8_t flip() const { return is_int8_ ? kOffset : 0; }
  float* scales() { return reinterpret_cast<float*>(scratch_.data() + scale_offset_); }

  // y from what is in q, whose fp8 type may differ from the weight's.
  void run(DType a_dtype, const float* a_scale, int64_t a_scale_step, const Tensor& y) {
    args_.a = q();
    args_.a_stride = q_stride_;
    args_.a_scale = a_scale;
    args_.a_scale_step = a_scale_step;
    args_.y = y.mutable_data_ptr();
    args_.y_dtype = kernel_dtype(y.scalar_type());
    if (!is_int8_) widen(a_dtype);
    if (is_int8_) {
      parallel_gemm(kernels_.gemm_int8, args_, shape_.m, kernels_.block_bytes);
    } else {
      parallel_gemm(kernels_.gemm_fp8, args_, shape_.m, kernels_.fp8_block_bytes);
    }
  }

 private:
  void widen(DType a_dtype) {
    uint8_t* wide = scratch_.data() + wide_offset_;
    const WidenArgs args{shape_.k, q(), q_stride_, a_dtype, wide, wide_stride_};
    parallel_rows(shape_.m, wide_stride_, [&](Range rows) { kernels_.widen_fp8(args, rows); });
    args_.a = wide;
    args_.a_stride = wide_stride_;
  }

  GemmShape shape_;
  const Kernels& kernels_;
  bool is_int8_;
  int64_t q_stride_, wide_stride_;
  int64_t scale_offset_, wide_offset_, weight_offset_;
  Scratch scratch_;
  GemmArgs args_{};
};

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

  Product product(shape, b, b_scale, bias);
  const auto* source = pointer<uint8_t>(a);
  parallel_rows(shape.m, shape.k,
                [&](Range rows) { copy_rows(source, shape.k, product.flip(), product.q(), product.q_stride(), rows); });
  product.run(kernel_dtype(a.scalar_type()), pointer<float>(a_scale), a_scale.numel() == 1 ? 0 : 1, y);
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

  Product product(shape, b, b_scale, bias);
  QuantizeArgs args{};
  args.k = shape.k;
  args.q = product.q();
  args.q_stride = product.q_stride();
  args.q_dtype = kernel_dtype(b.scalar_type());
  args.flip = product.flip();
  args.scale = product.scales();
  args.static_scale = a_scale.has_value() ? static_scale_value(op, "a_scale", *a_scale) : 0.0f;
  quantize_rows(args, shape.m);
  product.run(args.q_dtype, product.scales(), 1, y);
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
