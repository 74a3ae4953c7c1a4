// Chooses the instance of each quantize kernel and launches it.
#include "cuda/kernels/quantize.h"

#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/quantize.cuh"
#include "cuda/kernels/with_type.h"

namespace sq {
namespace {

template <typename T, bool kRotates>
auto choose_quantize(int groups) {
  switch (groups) {
    case 1:
      return quantize_rows_kernel<T, 1, kRotates>;
    case 2:
      return quantize_rows_kernel<T, 2, kRotates>;
    case 4:
      return quantize_rows_kernel<T, 4, kRotates>;
    case 8:
      return quantize_rows_kernel<T, 8, kRotates>;
    default:
      return quantize_rows_kernel<T, 0, kRotates>;
  }
}

}  // namespace

void launch_quantize_rows(const QuantizeRowsJob& job, void* stream) {
  if (job.rows == 0) return;
  with_float_type(job.x_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* x = static_cast<const T*>(job.x);
    const bool wide = can_move_groups(job.columns, x, job.smooth, job.target.q);
    const RowConfig config = row_config(job.columns, wide);
    const auto kernel =
        job.rotate == 0 ? choose_quantize<T, false>(config.groups) : choose_quantize<T, true>(config.groups);
    launch(kernel, job.rows, config.threads, 0, stream, x, job.smooth, job.target, job.columns, wide,
           rotation_of(job.rotate));
  });
}

void launch_quantize_static(const QuantizeStaticJob& job, void* stream) {
  if (job.count == 0) return;
  constexpr int kThreads = 256;
  constexpr int64_t kMostBlocks = 8192;  // enough to fill any GPU; the threads step over the rest
  const int64_t needed = (job.count + kThreads * kGroup - 1) / (kThreads * kGroup);
  const int64_t blocks = needed < kMostBlocks ? needed : kMostBlocks;
  with_float_type(job.x_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* x = static_cast<const T*>(job.x);
    const bool wide = is_group_aligned(x) && is_group_aligned(job.q);
    const auto kernel = job.rotate == 0 ? quantize_static_kernel<T, false> : quantize_static_kernel<T, true>;
    launch(kernel, blocks, kThreads, 0, stream, x, job.scale, job.q, job.q_dtype, job.count, wide,
           rotation_of(job.rotate));
  });
}

}  // namespace sq
