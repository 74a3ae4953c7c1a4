// Attention on torch's threads.
#pragma once

#include <functional>

#include "common/tensors.h"
#include "cpu/compute/parallel.h"

namespace sq {

// Of [B, heads, length, D], or of [B, heads, length], whose rows are one element.
inline AttentionStrides strides_of(const Tensor& x) {
  return {x.size(0) == 1 ? 0 : x.stride(0), x.size(1) == 1 ? 0 : x.stride(1), x.dim() == 4 ? x.stride(2) : 1};
}

// Blocks of queries 0, last, 1, last but one, ...: with a causal mask later ones are more work, and every consecutive
// piece of this order is about the same.
inline int64_t folded(int64_t index, int64_t count) { return index % 2 == 0 ? index / 2 : count - 1 - index / 2; }

inline void parallel_tasks(int64_t tasks, int64_t work, const std::function<void(int64_t)>& run) {
  const int64_t grain = std::max<int64_t>(1, kGemmGrain / std::max<int64_t>(1, work));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) run(task);
  });
}

// y of args for all batches and heads.
inline void parallel_attention(const Kernels& kernels, const AttentionArgs& args, int64_t batches) {
  const Attend attend = kernels.attention.run;
  const int64_t kv_heads = args.heads / args.group, q_len = args.q_len;
  const int64_t rows = q_len * args.group, work = args.kv_len * (args.d + args.v_d);
  const int64_t parts = is_direct(args, rows) ? div_up(args.kv_len, kAttentionChunk) : 1;
  if (parts <= 1) {
    const int64_t block = std::min(q_len, std::max<int64_t>(1, kAttentionRows / args.group));
    const int64_t blocks = div_up(q_len, block);
    parallel_tasks(batches * kv_heads * blocks, work * block * args.group, [&](int64_t index) {
      const int64_t first = folded(index % blocks, blocks) * block, pair = index / blocks;
      attend(args,
             {pair / kv_heads, pair % kv_heads, {first, std::min(q_len, first + block)}, {0, args.kv_len}, nullptr});
    });
    return;
  }
  const int64_t partial_size = rows * (args.v_d + 2);
  Scratch scratch(batches * kv_heads * parts * partial_size * static_cast<int64_t>(sizeof(float)));
  auto* partials = reinterpret_cast<float*>(scratch.data());
  parallel_tasks(batches * kv_heads * parts, work / parts * rows, [&](int64_t index) {
    const int64_t first = index % parts * kAttentionChunk, pair = index / parts;
    const Range keys{first, std::min(args.kv_len, first + kAttentionChunk)};
    attend(args, {pair / kv_heads, pair % kv_heads, {0, q_len}, keys, partials + index * partial_size});
  });
  parallel_tasks(batches * kv_heads, parts * partial_size, [&](int64_t pair) {
    const AttentionTask task{pair / kv_heads, pair % kv_heads, {0, q_len}, {0, args.kv_len}, nullptr};
    merge_attention(args, task, partials + pair * parts * partial_size, parts);
  });
}

}  // namespace sq
