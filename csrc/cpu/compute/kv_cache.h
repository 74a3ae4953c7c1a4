// The cache of an attention's keys or of its values, as an op's argument.
#pragma once

#include <cstring>

#include "common/tensors.h"
#include "cpu/kernels/dispatch.h"

namespace sq {

// Contiguous [B, heads, room, d]: in the dtype of what is appended or, with scales [B, heads, room], in INT8 as the
// per-token quantizer makes it of every head.
class CacheBuffer {
 public:
  // For an op that appends to x's batches, and has `total` tokens then.
  CacheBuffer(const char* op, const char* name, const Tensor& buffer, const char* scale_name,
              const OptionalTensor& scale, const Tensor& x, int64_t heads, int64_t total, int64_t d)
      : dtype_(kernel_dtype(x.scalar_type())), heads_(heads), d_(d) {
    check_same_device(op, name, buffer, "x", x);
    if (scale.has_value()) {
      SQ_CHECK(buffer.scalar_type() == ScalarType::Char, op, ": ", name, " is ", dtype_text(buffer.scalar_type()),
               ", expected int8, because it has scales");
    } else {
      SQ_CHECK(buffer.scalar_type() == x.scalar_type(), op, ": ", name, " is ", dtype_text(buffer.scalar_type()),
               " and x is ", dtype_text(x.scalar_type()), ", expected the same dtype");
    }
    SQ_CHECK(buffer.dim() == 4 && buffer.is_contiguous() && buffer.size(0) == x.size(0) && buffer.size(1) == heads &&
                 buffer.size(2) >= total && buffer.size(3) == d,
             op, ": ", name, " has shape ", shape_text(buffer), ", expected contiguous [", x.size(0), ", ", heads, ", ",
             total, " or more, ", d, "]");
    room_ = buffer.size(2);
    data_ = static_cast<uint8_t*>(buffer.mutable_data_ptr());
    if (!scale.has_value()) return;
    check_same_device(op, scale_name, *scale, "x", x);
    SQ_CHECK(scale->scalar_type() == ScalarType::Float, op, ": ", scale_name, " is ", dtype_text(scale->scalar_type()),
             ", expected float32");
    SQ_CHECK(scale->dim() == 3 && scale->is_contiguous() && scale->size(0) == x.size(0) && scale->size(1) == heads &&
                 scale->size(2) == room_,
             op, ": ", scale_name, " has shape ", shape_text(*scale), ", expected contiguous [", x.size(0), ", ", heads,
             ", ", room_, "]");
    scale_ = static_cast<float*>(scale->mutable_data_ptr());
  }

  bool is_int8() const { return scale_ != nullptr; }
  const void* data() const { return data_; }
  const float* scale() const { return scale_; }
  AttentionStrides strides() const { return {heads_ * room_ * d_, room_ * d_, d_}; }
  AttentionStrides scale_strides() const { return {heads_ * room_, room_, 1}; }

  // Where the elements of a token lie.
  uint8_t* address(int64_t batch, int64_t head, int64_t token) const {
    return data_ + ((batch * heads_ + head) * room_ + token) * d_ * (is_int8() ? 1 : element_size(dtype_));
  }

  // The heads [heads, d] of one token.
  void put(const Kernels& kernels, int64_t batch, int64_t token, const uint8_t* x) const {
    const int64_t bytes = d_ * element_size(dtype_);
    for (int64_t head = 0; head < heads_; ++head, x += bytes) {
      if (!is_int8()) {
        std::memcpy(address(batch, head, token), x, bytes);
        continue;
      }
      QuantizeArgs args{};
      args.k = args.q_stride = d_;
      args.x = x;
      args.x_dtype = dtype_;
      args.q = address(batch, head, token);
      args.q_dtype = DType::kInt8;
      args.scale = scale_ + (batch * heads_ + head) * room_ + token;
      kernels.quantize.run(args, {0, 1});
    }
  }

 private:
  DType dtype_;
  int64_t heads_, d_, room_ = 0;
  uint8_t* data_ = nullptr;
  float* scale_ = nullptr;
};

}  // namespace sq
