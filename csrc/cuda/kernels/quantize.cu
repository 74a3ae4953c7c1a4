// Chooses the instance of each quantize kernel and launches it.
#include "cuda/kernels/quantize.h"

#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/quantize.cuh"
#include "cuda/kernels/with_type.h"

namespace sq {

void launch_quantize_rows(const QuantizeRowsJob& job, void* stream) {
  if (job.rows == 0) return;
  with_float_type(job.x_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    const T* x = static_cast<const T*>(job.x);
    const bool wide = can_move_groups(job.columns, x, job.smooth, job.target.q);
    const RowConfig config = row_config(job.columns, wide);
    const auto kernel = [&] {
      switch (config.groups) {
        case 1:
          return quantize_rows_kernel<T, 1>;
        case 2:
          return quantize_rows_kernel<T, 2>;
        case 4:
          return quantize_rows_kernel<T, 4>;
        case 8:
          return quantize_rows_kernel<T, 8>;
        default:
          return quantize_rows_kernel<T, 0>;
      }
    }();
    launch(kernel, job.rows, config.threads, 0, stream, x, job.smooth, job.target, job.columns, wide);
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
    launch(quantize_static_kernel<T>, blocks, kThreads, 0, stream, x, job.scale, job.q, job.q_dtype, job.count, wide);
  });
}

}  // namespace sq
