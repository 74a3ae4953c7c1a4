// The tensor-core product of mma.cuh on the CPU, its instructions replaced by what their documents say: INT8 bit for bit
// against exact sums, FP8 within the rounding of fp32 sums, on edges of every kind.
#include "native/cuda/tensor_core_shim.h"

// After the shim.
#include "cuda/kernels/mma.cuh"
#include "native/cuda/tile_gemm_cases.h"

namespace {

using namespace sq;

template <DType kA, DType kB>
void run(const TileJob& job) {
  const int64_t tiles = tiles_of(job.epilogue.m, MmaTile::kM) * tiles_of(job.epilogue.n, MmaTile::kN);
  shim::run_tensor_cores(mma_gemm_kernel<kA, kB>, static_cast<unsigned>(tiles), unsigned{MmaTile::kThreads},
                         size_t{MmaTile::kSharedBytes}, job);
}

}  // namespace

int main() {
  test_tile_gemm([](auto a, auto b, const TileJob& job) { run<decltype(a)::value, decltype(b)::value>(job); });
}
