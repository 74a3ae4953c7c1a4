// Chooses the instance of the kernel of grouped_mma.cuh and launches it.
#include "cuda/kernels/grouped_mma.cuh"

#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/with_type.h"

namespace sq {
namespace {

template <DType kType, int kRows>
void launch_tiles(const GroupedJob& job, void* stream) {
  using Tile = MmaShape<kRows>;
  const int64_t blocks = grouped_blocks(job.tile_count, job.n, job.layer_count, Tile::kN);
  launch(grouped_mma_kernel<kType, Tile>, blocks, Tile::kThreads, Tile::kSharedBytes, stream, job,
         static_cast<uint32_t>(tiles_of(job.n, Tile::kN)));
}

}  // namespace

void launch_grouped_mma(const GroupedJob& job, int tile_rows, void* stream) {
  if (job.tile_count == 0 || job.n == 0) return;
  with_8bit_type(job.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    tile_rows == kFewMmaRows ? launch_tiles<kType, kFewMmaRows>(job, stream)
                             : launch_tiles<kType, many_mma_rows(kType != DType::kInt8)>(job, stream);
  });
}

}  // namespace sq
