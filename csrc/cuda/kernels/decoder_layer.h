// Launches of what stands between the products of q, k, v and the attention of a decoder layer, as quantize.h.
#pragma once

#include <cstdint>

#include "common/dtypes.h"

namespace sq {

// Heads as a product leaves them: x[row * step + head * d + i].
struct HeadRows {
  const void* x;
  int64_t step;
};

// The weight of an RMS norm of every head.
struct HeadNorm {
  const void* weight;  // [d], or null: no norm
  DType dtype;         // fp32, bf16 or fp16
};

// Keys or values of a cache.
struct CacheRows {
  void* data;    // [batch, kv_heads, room, d], contiguous, int8 where there are scales
  float* scale;  // [batch, kv_heads, room], contiguous, or null
  int64_t room;
};

// An additive mask [batches, heads, time, step] for torch's attention: 0 where a query sees a key, else -infinity. The
// flag of [batch, head, query, key] is visible[batch / group * strides[0] + batch % group * strides[1] + head * strides[2] +
// query * strides[3] + key * strides[4]].
struct MaskJob {
  void* y;                 // of the dtype of the heads; null: no mask
  const uint8_t* visible;  // null: all
  int64_t group, strides[5];
  int64_t batches, heads;
  int64_t length;  // keys
  int64_t step;    // length, made a multiple of kMaskColumns
  bool causal;     // and no key behind the query's own
};
constexpr int64_t kMaskColumns = 16;  // of a row, which begins at a multiple of 32 bytes so

struct AppendJob {
  DType dtype;  // of heads and angles: fp32, bf16 or fp16
  int64_t batch, time, heads, kv_heads, d;
  HeadRows q, k, v;
  HeadNorm q_norm, k_norm;
  float norm_offset, eps;
  const void *cos, *sin;     // [time, d], contiguous; of the first batch
  int64_t angle_batch;       // elements from the angles of a batch to the next; 0: the same for all
  int64_t past;              // new tokens go to [past, past + time)
  const int64_t* positions;  // [time], where they go instead; or null
  void* rotated_q;           // [batch, time, heads, d]
  CacheRows keys, values;
  MaskJob mask;
};

// Keys and values for attention that cannot read the cache itself.
struct CacheCopyJob {
  DType dtype;  // of y
  int64_t batch, kv_heads, length, d;
  int64_t copies;  // of every head, side by side
  CacheRows keys, values;
  void *y_keys, *y_values;  // [batch, kv_heads * copies, length, d]
};

// Blocks that the first launch needs; at most 2^31 - 1.
int64_t append_blocks(const AppendJob& job);

void launch_append(const AppendJob& job, void* stream);
void launch_cache_copy(const CacheCopyJob& job, void* stream);

}  // namespace sq
