// Chooses the instance of the activation kernel and launches it.
#include "cuda/kernels/activate.cuh"

#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/norm_activation.h"
#include "cuda/kernels/with_type.h"

namespace sq {
namespace {

template <typename T, bool kRotates>
auto choose_activation(Activation activation) {
  switch (activation) {
    case Activation::kSilu:
      return activate_rows_kernel<Activation::kSilu, T, kRotates>;
    case Activation::kGelu:
      return activate_rows_kernel<Activation::kGelu, T, kRotates>;
    case Activation::kGeluTanh:
      return activate_rows_kernel<Activation::kGeluTanh, T, kRotates>;
    default:
      return activate_rows_kernel<Activation::kRelu, T, kRotates>;
  }
}

}  // namespace

void launch_activate_rows(const ActivateJob& job, int64_t shared_bytes, void* stream) {
  if (job.rows == 0) return;
  const int threads = activate_threads(job.columns);
  const int64_t room = activate_room(job.columns, threads);
  with_float_type(job.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    ActivateTask<T> rows{};
    rows.gate = static_cast<const T*>(job.gate);
    rows.up = static_cast<const T*>(job.up);
    rows.columns = job.columns;
    rows.row_step = job.row_step;
    rows.target = job.target;
    rows.wide = can_move_groups(job.columns, rows.gate, rows.up, rows.target.q) && job.row_step % kGroup == 0;
    rows.is_kept = room <= shared_bytes;
    rows.rotation = rotation_of(job.rotate);
    const auto kernel =
        job.rotate == 0 ? choose_activation<T, false>(job.activation) : choose_activation<T, true>(job.activation);
    launch(kernel, job.rows, threads, rows.is_kept ? room : 0, stream, rows);
  });
}

}  // namespace sq
