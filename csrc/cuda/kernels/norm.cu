// Chooses the instance of the norm kernel and launches it.
#include "cuda/kernels/norm.cuh"

#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/norm_activation.h"
#include "cuda/kernels/with_type.h"

namespace sq {
namespace {

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <typename T, bool kQuantize, bool kRotates>
auto choose_norm(int groups) {
  switch (groups) {
    case 1:
      return norm_rows_kernel<T, 1, kQuantize, kRotates>;
    case 2:
      return norm_rows_kernel<T, 2, kQuantize, kRotates>;
    case 4:
      return norm_rows_kernel<T, 4, kQuantize, kRotates>;
    default:
      return norm_rows_kernel<T, 0, kQuantize, kRotates>;
  }
}

}  // namespace

void launch_norm_rows(const NormJob& job, void* stream) {
  if (job.rows == 0) return;
  with_float_type(job.x_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    NormTask<T> rows{};
    rows.x = static_cast<const T*>(job.x);
    rows.residual = static_cast<const T*>(job.residual);
    rows.sum = static_cast<T*>(job.sum);
    rows.weight = job.weight;
    rows.bias = job.bias;
    rows.weight_dtype = job.weight_dtype;
    rows.bias_dtype = job.bias_dtype;
    rows.offset = job.offset;
    rows.eps = job.eps;
    rows.is_layer = job.is_layer;
    rows.columns = job.columns;
    rows.target = job.target;
    rows.is_rounded = job.is_rounded;
    rows.rotation = rotation_of(job.rotate);
    rows.y = static_cast<T*>(job.y);
    rows.wide = can_move_groups(job.columns, rows.x, rows.residual, rows.sum, rows.target.q, rows.y) &&
                is_aligned(job.weight) && is_aligned(job.bias);
    const NormConfig config = norm_config(job.columns, rows.wide);
    const auto kernel = job.y != nullptr  ? choose_norm<T, false, false>(config.groups)
                        : job.rotate == 0 ? choose_norm<T, true, false>(config.groups)
                                          : choose_norm<T, true, true>(config.groups);
    // 64 KB at most, which every GPU from sm_80 on has.
    const int64_t bytes = config.groups == 0 ? 0 : job.columns * static_cast<int64_t>(sizeof(T));
    launch(kernel, job.rows, config.threads, bytes, stream, rows);
  });
}

}  // namespace sq
