// Launches of the experts' products without tensor cores, and of what comes before and after them.
#include "cuda/kernels/combine.cuh"
#include "cuda/kernels/grouped_skinny.cuh"
#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/route.cuh"
#include "cuda/kernels/with_type.h"

namespace sq {
namespace {

template <typename Sum, int kRows>
void launch_skinny(const GroupedJob& job, void* stream) {
  bool wide = true;
  for (int i = 0; i < job.layer_count; ++i) wide = wide && can_move_words(job.a, job.layers[i].b, job.k);
  launch(grouped_skinny_kernel<Sum, kRows, kSkinnyColumns>,
         grouped_blocks(job.tile_count, job.n, job.layer_count, kSkinnyColumns), skinny_threads(job.k), 0, stream, job,
         static_cast<uint32_t>(tiles_of(job.n, kSkinnyColumns)), wide);
}

template <typename Sum>
void launch_skinny(const GroupedJob& job, int tile_rows, void* stream) {
  if (tile_rows == 1) return launch_skinny<Sum, 1>(job, stream);
  if (tile_rows == 2) return launch_skinny<Sum, 2>(job, stream);
  if (tile_rows == 4) return launch_skinny<Sum, 4>(job, stream);
  launch_skinny<Sum, kSkinnyRows>(job, stream);
}

}  // namespace

void launch_route(const RouteJob& job, void* stream) {
  launch(route_kernel, job.experts, route_threads(job.slots), 0, stream, job);
}

void launch_combine(const CombineJob& job, void* stream) {
  const int64_t blocks = combine_blocks(job.tokens, job.columns);
  if (blocks == 0) return;
  with_float_type(job.y_dtype, [&](auto type) {
    using Y = typename decltype(type)::type;
    const bool wide = can_move_groups(job.columns, job.x, static_cast<const Y*>(job.y));
    launch(combine_kernel<Y>, blocks, kCombineThreads, 0, stream, job, static_cast<unsigned>(blocks / job.tokens),
           wide);
  });
}

void launch_grouped_skinny(const GroupedJob& job, int tile_rows, void* stream) {
  if (job.tile_count == 0 || job.n == 0) return;
  job.dtype == DType::kInt8 ? launch_skinny<int32_t>(job, tile_rows, stream)
                            : launch_skinny<float>(job, tile_rows, stream);
}

}  // namespace sq
