// Scaled dot-product attention, with several heads of q sharing one of k and v:
//   y[b, i, h] = sum_j p[j] v[b, h / group, j],   p = softmax over the visible j of scale * q[b, h, i] . k[b, h / group, j]
// Scores, the running maximum and sum of the softmax, and y are fp32 until y is cast; p is rounded to the dtype in which
// the CPU multiplies, bf16 or fp32. Blocks of keys are visited in order and their number depends on shapes alone, so that
// any number of threads gives the same bits. A query that sees no key gives 0.
// k and v may be INT8 with a scale for every row, as the per-token quantizer makes them: k[j] is then k_scale[j] times the
// integers, and v[j] likewise. Scores are multiplied by k_scale, and p, after it was summed, by v_scale; integers are exact
// in every type that products read, so that nothing is rounded that was not before.
// (Online softmax: Milakov and Gimelshein, arXiv:1805.02867; blocks: FlashAttention, arXiv:2205.14135.)
//
// Few rows of q (decoding) read k and v as they lie, each once: the cost is the bytes. Many rows pack blocks of kKeys keys
// first, as the operands of register-blocked products. So does a whole text, however short, that no cache precedes: what
// padding adds to it are keys whose p is 0, and it has the same bits alone and in a batch with longer ones.
#pragma once

#include <cstdint>

#include "common/dtypes.h"
#include "cpu/kernels/gemm.h"

namespace sq {

// Where batch b, head h, row i of a tensor begins: b * batch + h * head + i * row elements in. Rows are contiguous.
struct AttentionStrides {
  int64_t batch, head, row;
};

struct AttentionArgs {
  DType dtype;  // of q and y, and of k and v unless these have scales: fp32, bf16 or fp16
  int64_t heads, group;
  int64_t q_len, kv_len;
  int64_t d, v_d;  // elements of a row of q and k, and of v and y
  const void *q, *k, *v;
  AttentionStrides q_strides, k_strides, v_strides;
  const float *k_scale, *v_scale;                     // of every row of k and v, which are INT8 then; or both null
  AttentionStrides k_scale_strides, v_scale_strides;  // row: 1
  const uint8_t* mask;                                // [b, h, i, j], not 0 where query i may see key j; or null
  AttentionStrides mask_strides;
  float scale;  // positive
  bool causal;  // query i sees the keys up to i + kv_len - q_len
  void* y;      // [b, q_len, heads, v_d], contiguous
};

// The queries of a range, for all heads that share k and v: rows = group * queries, row r being query r / group of head
// r % group.
struct AttentionTask {
  int64_t batch, kv_head;
  Range queries, keys;
  // [rows, v_d + 2]: the unnormalized sum of p v, then the largest score and the sum of p, for merge_attention. With null,
  // `keys` must be all, and y is written.
  float* partial;
};

using Attend = void (*)(const AttentionArgs& args, const AttentionTask& task);

struct AttentionKernels {
  const char* name;
  Attend run;
};

// Avx512Bf16 multiplies bf16 by vdpbf16ps and Amx by tdpbf16ps; other types are multiplied as Avx512 does.
extern const AttentionKernels kAttentionPortable, kAttentionAvx2, kAttentionAvx512, kAttentionAvx512Bf16, kAttentionAmx;

// y of the task's queries from the partial results [parts, rows, v_d + 2] of ranges of keys.
void merge_attention(const AttentionArgs& args, const AttentionTask& task, const float* partials, int64_t parts);

constexpr int64_t kAttentionRows = 384;       // rows of a task that packs keys: packing then costs a few percent
constexpr int64_t kAttentionDirectRows = 16;  // up to here k and v are read as they lie
constexpr int64_t kAttentionChunk = 256;      // keys of a task with few rows, for more tasks than heads

// Whether a task of so many rows reads k and v as they lie.
inline bool is_direct(const AttentionArgs& args, int64_t rows) {
  return rows <= kAttentionDirectRows && args.q_len < args.kv_len;
}

}  // namespace sq
