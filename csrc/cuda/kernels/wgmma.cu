// Chooses the instance of the kernel of wgmma.cuh and launches it.
#include "cuda/kernels/wgmma.cuh"

#include <algorithm>

#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/with_type.h"

namespace sq {
namespace {

template <typename Tile>
void launch_wgmma(const WgmmaJob& job, void* stream) {
  const TileJob& product = job.product;
  const int64_t tiles = tiles_of(product.epilogue.m, Tile::kM) * tiles_of(product.epilogue.n, Tile::kN);
  const int64_t blocks = std::min<int64_t>(tiles * job.splits, job.multiprocessors);
  with_operand_types(product.a_dtype, product.b_dtype, [&](auto a, auto b) {
    launch(wgmma_gemm_kernel<decltype(a)::value, decltype(b)::value, Tile>, blocks, Tile::kThreads, Tile::kSharedBytes,
           stream, product, job.splits, job.parts, job.a_map, job.b_map);
  });
}

}  // namespace

void launch_wgmma_gemm(const WgmmaJob& job, void* stream) {
  job.is_swapped ? launch_wgmma<SwapTile>(job, stream) : launch_wgmma<WgmmaTile>(job, stream);
}

}  // namespace sq
