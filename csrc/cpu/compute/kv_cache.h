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
  // For what is appended in this dtype. The tensors are checked already.
  CacheBuffer(const Tensor& buffer, const OptionalTensor& scale, DType dtype)
      : dtype_(dtype),
        heads_(buffer.size(1)),
        room_(buffer.size(2)),
        d_(buffer.size(3)),
        data_(static_cast<uint8_t*>(buffer.mutable_data_ptr())),
        scale_(scale.has_value() ? static_cast<float*>(scale->mutable_data_ptr()) : nullptr) {}

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
  int64_t heads_, room_, d_;
  uint8_t* data_;
  float* scale_;
};

}  // namespace sq
