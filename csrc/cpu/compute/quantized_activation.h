// An 8-bit activation in scratch memory, ready for the kernels.
#pragma once

#include <vector>

#include "cpu/compute/parallel.h"
#include "cpu/kernels/dispatch.h"

namespace sq {

// An 8-bit activation [m, k] as the kernels read it, its scales, and for fp8 its values once more, widened. It plans its
// parts of a buffer first and is placed in it then.
class QuantizedActivation {
 public:
  QuantizedActivation(const Kernels& kernels, int64_t m, int64_t k, DType dtype, Plan& plan)
      : kernels_(kernels),
        k_(k),
        dtype_(dtype),
        q_stride_(padded_k(k) + kRowPad),
        wide_stride_(is_int8() ? 0 : padded_k(k) * kernels.fp8.element_size + kRowPad),
        q_(plan.add(padded_rows(m) * q_stride_)),
        scales_(plan.add<float>(m)),
        wide_(plan.add(padded_rows(m) * wide_stride_)) {}

  void place(Scratch& scratch) { memory_ = scratch.data(); }

  bool is_int8() const { return dtype_ == DType::kInt8; }
  uint8_t flip() const { return is_int8() ? kOffset : 0; }
  uint8_t* q() { return q_.in(memory_); }
  int64_t q_stride() const { return q_stride_; }
  float* scales() { return scales_.in(memory_); }

  // For a quantizer that fills it: everything but the source. A static scale of 0 means one per token.
  QuantizeArgs target(float static_scale) {
    QuantizeArgs args{};
    args.k = k_;
    args.q = q();
    args.q_stride = q_stride_;
    args.q_dtype = dtype_;
    args.flip = flip();
    args.scale = scales();
    args.static_scale = static_scale;
    return args;
  }

  // Fills the first rows from contiguous rows of x, rotated in blocks or not.
  void quantize(const void* x, DType x_dtype, float static_scale, int64_t rotate, int64_t rows) {
    QuantizeArgs args = target(static_scale);
    args.x = x;
    args.x_dtype = x_dtype;
    parallel_quantize(kernels_, args, rotate, rows);
  }

  // The products of the first rows with weights, in one parallel region. Those without scales for the activation get the
  // activation's own; a_dtype is the fp8 type of the values.
  void multiply(std::vector<GemmArgs> products, DType a_dtype, int64_t rows) {
    widen_first(rows, a_dtype);
    for (GemmArgs& args : products) complete(args, rows);
    parallel_gemm(gemm().run, products, rows, gemm().block_bytes);
  }

  // The same for products of some of the first rows each.
  void multiply(std::vector<RowsProduct> products, DType a_dtype, int64_t rows) {
    widen_first(rows, a_dtype);
    for (RowsProduct& product : products) complete(product.args, product.rows.end - product.rows.begin);
    parallel_gemm(gemm().run, products, gemm().block_bytes);
  }

 private:
  const GemmKernels& gemm() const { return is_int8() ? kernels_.int8 : kernels_.fp8; }

  void widen_first(int64_t rows, DType a_dtype) {
    if (is_int8()) return;
    const WidenArgs args{k_, q(), q_stride_, a_dtype, wide_.in(memory_), wide_stride_};
    parallel_rows(rows, wide_stride_, [&](Range range) { kernels_.fp8.widen(args, range); });
  }

  // The activation's part of a product's arguments.
  void complete(GemmArgs& args, int64_t m) {
    args.m = m;
    args.a = is_int8() ? q() : wide_.in(memory_);
    args.a_stride = is_int8() ? q_stride_ : wide_stride_;
    if (args.a_scale == nullptr) {
      args.a_scale = scales();
      args.a_scale_step = 1;
    }
  }

  const Kernels& kernels_;
  int64_t k_;
  DType dtype_;
  int64_t q_stride_, wide_stride_;
  Plan::Part<uint8_t> q_;
  Plan::Part<float> scales_;
  Plan::Part<uint8_t> wide_;
  uint8_t* memory_ = nullptr;
};

}  // namespace sq
