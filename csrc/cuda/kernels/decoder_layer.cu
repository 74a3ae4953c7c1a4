// Chooses the instances of the kernels of decoder_layer.h and launches them.
#include "cuda/kernels/decoder_layer.cuh"

#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/with_type.h"

namespace sq {
namespace {

int64_t blocks_of_heads(const AppendJob& job) {
  return head_blocks(job.batch * job.time * (job.heads + 2 * job.kv_heads));
}

template <typename T>
bool can_copy_groups(const CacheCopyJob& job) {
  const auto* y_keys = static_cast<const T*>(job.y_keys);
  const auto* y_values = static_cast<const T*>(job.y_values);
  if (!can_move_groups(job.d, y_keys, y_values)) return false;
  return job.keys.scale == nullptr
             ? can_move_groups(job.d, static_cast<const T*>(job.keys.data), static_cast<const T*>(job.values.data))
             : can_move_groups(job.d, static_cast<const uint8_t*>(job.keys.data),
                               static_cast<const uint8_t*>(job.values.data));
}

}  // namespace

int64_t append_blocks(const AppendJob& job) { return blocks_of_heads(job) + mask_blocks(job.mask, job.time); }

void launch_append(const AppendJob& job, void* stream) {
  const int64_t blocks = append_blocks(job);
  if (blocks == 0) return;
  const auto first_mask_block = static_cast<unsigned>(blocks_of_heads(job));
  with_float_type(job.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(append_kernel<T>, blocks, kAppendThreads, 0, stream, job, first_mask_block);
  });
}

void launch_cache_copy(const CacheCopyJob& job, void* stream) {
  constexpr int kThreads = 256;
  constexpr int64_t kMostBlocks = 8192;  // enough to fill any GPU; the threads step over the rest
  const int64_t needed = (copied_groups(job) + kThreads - 1) / kThreads;
  if (needed == 0) return;
  with_float_type(job.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    launch(cache_copy_kernel<T>, needed < kMostBlocks ? needed : kMostBlocks, kThreads, 0, stream, job,
           can_copy_groups<T>(job));
  });
}

}  // namespace sq
