// From the products of q, k and v to the attention's result: norms of heads, rotation, cache, attention.
#pragma once

#include <vector>

#include "common/decoder_layer_checks.h"
#include "cuda/compute/launch.h"

namespace sq {

struct HeadCounts {
  int64_t batch, time, heads, kv_heads, d;

  int64_t sharing() const { return heads / kv_heads; }  // heads of q that read one of k
};

// How torch's attention is called. Its fast kernels take either a mask or fewer heads of k than of q, not both.
struct AttentionPlan {
  bool has_mask;   // which the launch that fills the cache makes too
  bool is_causal;  // without a mask
  bool is_folded;  // one token: the queries that share a head are rows of one head, of a batch of its own
  int64_t copies;  // of every head of the cache, dequantized; 0: the cache is read as it lies
  bool enable_gqa;
};
AttentionPlan plan_attention(const DecoderArguments& arguments, const HeadCounts& counts);

// [B, T, H * D], contiguous, of q, k and v [B, T, heads * D], contiguous or columns of one contiguous tensor; keys and
// values go to the cache.
Tensor attend_cuda(const char* op, const DecoderArguments& arguments, const HeadCounts& counts,
                   const std::vector<Tensor>& qkv, double offset, double head_eps);

}  // namespace sq
