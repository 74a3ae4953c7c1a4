// torch's attention, called through its dispatcher.
#pragma once

#include <array>

#include "common/tensors.h"

namespace sq {

// What aten::scaled_dot_product_attention takes, without dropout.
struct AttentionCall {
  const Tensor &q, &k, &v;  // [B, H, T, D], [B, H or Hkv, S, D]
  OptionalTensor mask;      // added to the scores, of the dtype of q, [1 or B, 1 or H, T, S]
  bool is_causal;           // query i sees keys up to i
  double scale;
  bool enable_gqa;  // heads of k and v serve several of q
};

// [B, H, T, D], with the strides that torch chose.
inline Tensor scaled_dot_product_attention(const AttentionCall& call) {
  using torch::stable::detail::from;
  std::array<StableIValue, 8> stack{from(call.q),
                                    from(call.k),
                                    from(call.v),
                                    from(call.mask),
                                    from(0.0 /* dropout_p */),
                                    from(call.is_causal),
                                    from(std::optional<double>(call.scale)),
                                    from(call.enable_gqa)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::scaled_dot_product_attention", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace sq
