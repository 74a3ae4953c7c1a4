// The tensor-core product of wgmma.cuh on the CPU, its instructions replaced by what their documents say, with the copies
// and the products under way while others run: INT8 bit for bit against exact sums, FP8 within the rounding of fp32 sums,
// on edges of every kind, with a block for each tile and with blocks that take several; as it is and with operands
// that change places.
#include "native/cuda/tensor_core_shim.h"

// After the shim.
#include "cuda/kernels/wgmma.cuh"
#include "native/cuda/tile_gemm_cases.h"

namespace {

using namespace sq;

TensorMap map_of(const uint8_t* data, int64_t rows, int64_t k, int box_rows) {
  return shim::map_of_rows({data, rows, k, box_rows, WgmmaTile::kK});
}

template <typename Tile, DType kA, DType kB>
void run(const TileJob& job, unsigned blocks, int splits, void* parts) {
  shim::run_tensor_cores(wgmma_gemm_kernel<kA, kB, Tile>, blocks, unsigned{Tile::kThreads}, size_t{Tile::kSharedBytes},
                         job, splits, parts, map_of(job.a, job.epilogue.m, job.k, Tile::kM),
                         map_of(job.b, job.epilogue.n, job.k, Tile::kN));
}

// The sums of the splits, which memory of exactly their size holds, and what epilogue.cuh does with them.
template <DType kA, DType kB>
void run_swapped(const TileJob& job, unsigned blocks, int splits) {
  const Epilogue& epilogue = job.epilogue;
  const int64_t count = epilogue.m * epilogue.n;
  const Buffer<SumOf<kA>> parts(splits * count);
  std::memset(parts.data(), 0xa5, static_cast<size_t>(parts.size()) * sizeof parts[0]);
  run<SwapTile, kA, kB>(job, blocks, splits, parts.data());
  for (int64_t i = 0; i < count; ++i) {
    SumOf<kA> sum = parts[i];
    for (int split = 1; split < splits; ++split) sum += parts[split * count + i];
    store_value(epilogue.y, epilogue.y_dtype, i, epilogue_value(epilogue, i / epilogue.n, i % epilogue.n, sum));
  }
}

}  // namespace

int main() {
  unsigned blocks = 0;
  test_tile_gemm([&](auto a, auto b, const TileJob& job) {
    blocks = blocks % 3 + 1;
    run<WgmmaTile, decltype(a)::value, decltype(b)::value>(job, blocks, 1, nullptr);
  });
  test_tile_gemm([&](auto a, auto b, const TileJob& job) {
    blocks = blocks % 5 + 1;
    const auto k_tiles = static_cast<int>(tiles_of(job.k, SwapTile::kK));
    run_swapped<decltype(a)::value, decltype(b)::value>(job, blocks,
                                                        std::min(k_tiles, 1 + static_cast<int>(blocks) % 4));
  });
}
