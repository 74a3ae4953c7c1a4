// The tensor-core product of wgmma.cuh on the CPU, its instructions replaced by what their documents say, with the copies
// and the products under way while others run: INT8 bit for bit against exact sums, FP8 within the rounding of fp32 sums,
// on edges of every kind, with a block for each tile and with blocks that take several.
#include "tensor_core_shim.h"

// After the shim.
#include "kernels/wgmma.cuh"
#include "tile_gemm_cases.h"

namespace {

using namespace sq;

TensorMap map_of(const uint8_t* data, int64_t rows, int64_t k) {
  return shim::map_of_rows({data, rows, k, WgmmaTile::kM, WgmmaTile::kK});
}

template <DType kA, DType kB>
void run(const TileJob& job, unsigned blocks) {
  shim::run_tensor_cores(wgmma_gemm_kernel<kA, kB>, blocks, unsigned{WgmmaTile::kThreads},
                         size_t{WgmmaTile::kSharedBytes}, job, map_of(job.a, job.finish.m, job.k),
                         map_of(job.b, job.finish.n, job.k));
}

}  // namespace

int main() {
  unsigned blocks = 0;
  test_tile_gemm([&](auto a, auto b, const TileJob& job) {
    blocks = blocks % 3 + 1;
    run<decltype(a)::value, decltype(b)::value>(job, blocks);
  });
}
