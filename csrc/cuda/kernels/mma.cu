// Chooses the instance of the kernel of mma.cuh and launches it.
#include "cuda/kernels/mma.cuh"

#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/with_type.h"

namespace sq {

void launch_mma_gemm(const TileJob& job, void* stream) {
  const Epilogue& epilogue = job.epilogue;
  const int64_t tiles = tiles_of(epilogue.m, MmaTile::kM) * tiles_of(epilogue.n, MmaTile::kN);
  with_operand_types(job.a_dtype, job.b_dtype, [&](auto a, auto b) {
    launch(mma_gemm_kernel<decltype(a)::value, decltype(b)::value>, tiles, MmaTile::kThreads, MmaTile::kSharedBytes,
           stream, job);
  });
}

}  // namespace sq
