// 8-bit product on Hopper's tensor cores, y = cast((a @ b.T) * (a_scale * b_scale) + bias): TMA, wgmma, one block a
// multiprocessor that stays. a [m, k] and b [n, k], k a multiple of 16, both beginning at multiples of 16 bytes; any m and n.
//
// A block takes tile after tile of y, WgmmaTile. One of its threads does nothing but start copies: boxes of 128 bytes of k,
// which TMA swizzles (swizzle_128) and fills up with zeros past the matrix, into a ring of stages, on into the next tile
// while the last one is being finished. Two warpgroups multiply, each 64 rows, and give a stage back when their products
// of it are done. For each stage there is a barrier on which its bytes arrive (full) and one on which the warps that
// multiply do (empty). Scales, bias and cast are done from registers.
// Bytes moved: n * k once for every 128 rows of a and m * k once for every 128 rows of b, through L2; m * n * sizeof(Y).
//
// For few tokens operands change places, SwapTile: the weight's rows are those of the product, and k is split among blocks
// until all multiprocessors read. Each split leaves its sums in memory for epilogue.cuh, which adds them in their order.
// Bytes moved: n * k, and m * k for every 128 rows of b; 8 * m * n for each split; m * n * sizeof(Y).
//
// INT8 sums are exact int32, and products of two stages overlap. Tensor cores keep about 14 bits of sums of fp8 products
// (DeepSeek-V3's report, 3.3.2), so sums of each stage are added up in fp32 outside of them, while the other warpgroup
// multiplies.
#pragma once

#include "cuda/kernels/group.cuh"
#include "cuda/kernels/store_tile.cuh"
#include "cuda/kernels/tile_gemm.h"
#include "cuda/kernels/wgmma_instructions.cuh"

namespace sq {

// The ring in shared memory, as addresses. Rows and columns are those of the product that wgmma computes.
template <typename Tile>
struct WgmmaRing {
  uint32_t stages, barriers;

  __device__ __forceinline__ explicit WgmmaRing(uint32_t room)
      : stages((room + Tile::kAlignment - 1) / Tile::kAlignment * Tile::kAlignment),
        barriers(stages + static_cast<uint32_t>(Tile::kStages * Tile::kStageBytes)) {}

  __device__ __forceinline__ uint32_t rows(int stage) const {
    return stages + static_cast<uint32_t>(stage * Tile::kStageBytes);
  }
  __device__ __forceinline__ uint32_t columns(int stage) const {
    return rows(stage) + static_cast<uint32_t>(Tile::kRows * Tile::kK);
  }
  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + static_cast<uint32_t>(stage * 8); }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(Tile::kStages + stage); }
};

// What a block does at a time: a tile of y from [row, column] on, or a part of k of it.
struct WgmmaWork {
  int64_t row, column;
  int split;
  SplitRange k_tiles;
};

// visit(WgmmaWork) for all that is this block's, in the same order for everybody in it.
template <typename Tile, typename Visit>
__device__ __forceinline__ void for_own_work(const TileJob& job, int splits, const Visit& visit) {
  const int64_t rows = tiles_of(job.epilogue.m, Tile::kM), columns = tiles_of(job.epilogue.n, Tile::kN);
  const auto k_tiles = static_cast<int>(tiles_of(job.k, Tile::kK));
  for (int64_t index = blockIdx.x; index < rows * columns * splits; index += gridDim.x) {
    const TilePlace place = tile_place(index / splits, rows, columns);
    const auto split = static_cast<int>(index % splits);
    visit(WgmmaWork{place.row * Tile::kM, place.column * Tile::kN, split, split_range(k_tiles, splits, split)});
  }
}

// The thread that loads.
template <typename Tile>
__device__ __forceinline__ void fill_ring(const WgmmaRing<Tile>& ring, const TileJob& job, int splits,
                                          const TensorMap& a_map, const TensorMap& b_map) {
  RingPlace place{0, 0};
  for_own_work<Tile>(job, splits, [&](const WgmmaWork& work) {
    for (int k_tile = work.k_tiles.begin; k_tile < work.k_tiles.end; ++k_tile) {
      wait_for_barrier(ring.empty(place.stage), place.phase ^ 1);
      const uint32_t full = ring.full(place.stage);
      const uint32_t rows = ring.rows(place.stage), columns = ring.columns(place.stage);
      const int k = k_tile * Tile::kK;
      arrive_expecting(full, Tile::kStageBytes);  // bytes outside the matrix are counted too
      copy_box(Tile::kIsSwapped ? columns : rows, a_map, k, static_cast<int>(work.row), full);
      copy_box(Tile::kIsSwapped ? rows : columns, b_map, k, static_cast<int>(work.column), full);
      place = next_place(place, Tile::kStages);
    }
  });
}

// Starts the products of a stage: sums = or += its 64 rows times its columns, of which the descriptors are.
template <DType kRows, DType kColumns, typename Tile, int kN>
__device__ __forceinline__ void multiply_stage(SumOf<kRows> (&sums)[kN][4], uint64_t rows, uint64_t columns,
                                               bool adds) {
  hold(sums);
  fence_products();
  SQ_UNROLL
  for (int k = 0; k < Tile::kK; k += kMmaK) {
    multiply_async<kRows, kColumns>(sums, advance_descriptor(rows, k), advance_descriptor(columns, k), adds || k > 0);
  }
  commit_products();
}

// A warp is done with a stage.
template <typename Tile>
__device__ __forceinline__ void give_back(const WgmmaRing<Tile>& ring, int stage) {
  if (threadIdx.x % 32 == 0) arrive(ring.empty(stage));
}

// The warpgroups that multiply.
template <DType kRows, DType kColumns, typename Tile>
__device__ __forceinline__ void empty_ring(const WgmmaRing<Tile>& ring, const TileJob& job, int splits, void* parts) {
  using Sum = SumOf<kRows>;
  constexpr int kN = Tile::kColumns / 8;
  const int first = static_cast<int>(threadIdx.x) / 128 * 64;  // of the tile's rows
  RingPlace place{0, 0};
  for_own_work<Tile>(job, splits, [&](const WgmmaWork& work) {
    Sum sums[1][kN][4] = {};
    int before = 0;  // the stage whose products are under way
    for (int k_tile = work.k_tiles.begin; k_tile < work.k_tiles.end; ++k_tile) {
      const bool is_first = k_tile == work.k_tiles.begin;
      wait_for_barrier(ring.full(place.stage), place.phase);
      const uint64_t rows = matrix_descriptor(ring.rows(place.stage) + static_cast<uint32_t>(first * Tile::kK));
      const uint64_t columns = matrix_descriptor(ring.columns(place.stage));
      if constexpr (kRows == DType::kInt8) {
        multiply_stage<kRows, kColumns, Tile>(sums[0], rows, columns, true);
        wait_for_products<1>();
        if (!is_first) give_back(ring, before);
        before = place.stage;
      } else {
        Sum part[kN][4];
        multiply_stage<kRows, kColumns, Tile>(part, rows, columns, false);
        wait_for_products<0>();
        hold(part);
        give_back(ring, place.stage);
        SQ_UNROLL
        for (int i = 0; i < 4 * kN; ++i) sums[0][i / 4][i % 4] += part[i / 4][i % 4];
      }
      place = next_place(place, Tile::kStages);
    }
    if constexpr (kRows == DType::kInt8) {
      wait_for_products<0>();
      hold(sums[0]);
      give_back(ring, before);
    }
    const int own = first + static_cast<int>(threadIdx.x) / 32 % 4 * 16;
    if constexpr (Tile::kIsSwapped) {
      const int64_t m = job.epilogue.m, n = job.epilogue.n;
      store_swapped_sums(static_cast<Sum*>(parts) + work.split * m * n, m, n, work.row, work.column + own, sums[0]);
    } else {
      store_tile(job.epilogue, AllRows{}, work.row + own, work.column, sums);
    }
  });
}

// Grid: any number of blocks, as many as there are multiprocessors; threads and shared memory of Tile. Swapped, its result is
// not y but sums in parts [splits, m, n]; otherwise there is one split.
template <DType kA, DType kB, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    wgmma_gemm_kernel(TileJob job, int splits, void* parts, const __grid_constant__ TensorMap a_map,
                      const __grid_constant__ TensorMap b_map) {
  if constexpr (!has_wgmma()) {
    trap();
  } else {
    SQ_DYNAMIC_SHARED(uint8_t, room);
    const WgmmaRing<Tile> ring(shared_address(room));
    constexpr unsigned kMultipliers = Tile::kWarpgroups * 128;
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < Tile::kStages; ++stage) {
        init_barrier(ring.full(stage), 1);
        init_barrier(ring.empty(stage), kMultipliers / 32);
      }
      fence_barriers();
      prefetch_map(a_map);
      prefetch_map(b_map);
    }
    __syncthreads();
    if (threadIdx.x < kMultipliers) {
      empty_ring<Tile::kIsSwapped ? kB : kA, Tile::kIsSwapped ? kA : kB>(ring, job, splits, parts);
    } else if (threadIdx.x == kMultipliers) {
      fill_ring(ring, job, splits, a_map, b_map);
    }
  }
}

}  // namespace sq
