// Chooses the instance of the kernel of wgmma.cuh and launches it.
#include "kernels/wgmma.cuh"

#include <algorithm>

#include "kernels/launch.cuh"
#include "kernels/with_type.h"

namespace sq {

void launch_wgmma_gemm(const TileJob& job, const TensorMap& a_map, const TensorMap& b_map, int multiprocessors,
                       void* stream) {
  const int64_t tiles = tiles_of(job.finish.m, WgmmaTile::kM) * tiles_of(job.finish.n, WgmmaTile::kN);
  const int64_t blocks = std::min<int64_t>(tiles, multiprocessors);
  with_operand_types(job.a_dtype, job.b_dtype, [&](auto a, auto b) {
    launch(wgmma_gemm_kernel<decltype(a)::value, decltype(b)::value>, blocks, WgmmaTile::kThreads,
           WgmmaTile::kSharedBytes, stream, job, a_map, b_map);
  });
}

}  // namespace sq
