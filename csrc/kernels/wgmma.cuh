// 8-bit product on Hopper's tensor cores, y = cast((a @ b.T) * (a_scale * b_scale) + bias): TMA, wgmma, one block a
// multiprocessor that stays. a [m, k] and b [n, k], k a multiple of 16, both beginning at multiples of 16 bytes; any m and n.
//
// A block takes tile after tile of y, WgmmaTile. One of its threads does nothing but start copies: boxes of 128 rows and
// 128 bytes of k, which TMA swizzles (swizzle_128) and fills up with zeros past the matrix, into a ring of stages, on into
// the next tile while the last one is being finished. Two warpgroups multiply, each 64 rows, and give a stage back when
// their products of it are done. For each stage there is a barrier on which its bytes arrive (full) and one on which the
// warps that multiply do (empty). Scales, bias and cast are done from registers.
// Bytes moved: n * k once for every 128 rows of a and m * k once for every 128 rows of b, through L2; m * n * sizeof(Y).
//
// INT8 sums are exact int32, and products of two stages overlap. Tensor cores keep about 13 bits behind the largest of the
// fp8 products that they add (DeepSeek-V3's report, 3.3.2), so sums of each stage are added up in fp32 outside of them,
// while the other warpgroup multiplies.
#pragma once

#include "kernels/group.cuh"
#include "kernels/store_tile.cuh"
#include "kernels/tile_gemm.h"
#include "kernels/wgmma_instructions.cuh"

namespace sq {

// The ring in shared memory, as addresses.
struct WgmmaRing {
  uint32_t stages, barriers;

  __device__ __forceinline__ uint32_t a(int stage) const {
    return stages + static_cast<uint32_t>(stage * WgmmaTile::kStageBytes);
  }
  __device__ __forceinline__ uint32_t b(int stage) const {
    return a(stage) + static_cast<uint32_t>(WgmmaTile::kM * WgmmaTile::kK);
  }
  __device__ __forceinline__ uint32_t full(int stage) const { return barriers + static_cast<uint32_t>(stage * 8); }
  __device__ __forceinline__ uint32_t empty(int stage) const { return full(WgmmaTile::kStages + stage); }
};

__device__ __forceinline__ WgmmaRing wgmma_ring(uint32_t room) {
  constexpr uint32_t kAlignment = WgmmaTile::kAlignment;
  const uint32_t stages = (room + kAlignment - 1) / kAlignment * kAlignment;
  return {stages, stages + static_cast<uint32_t>(WgmmaTile::kStages * WgmmaTile::kStageBytes)};
}

// What every block does to every tile of its own: visit(row, column) of y.
template <typename Visit>
__device__ __forceinline__ void for_own_tiles(const Finish& finish, const Visit& visit) {
  const int64_t rows = tiles_of(finish.m, WgmmaTile::kM), columns = tiles_of(finish.n, WgmmaTile::kN);
  for (int64_t index = blockIdx.x; index < rows * columns; index += gridDim.x) {
    const TilePlace place = tile_place(index, rows, columns);
    visit(place.row * WgmmaTile::kM, place.column * WgmmaTile::kN);
  }
}

// The thread that loads.
__device__ __forceinline__ void fill_ring(const WgmmaRing& ring, const TileJob& job, const TensorMap& a_map,
                                          const TensorMap& b_map) {
  const auto k_tiles = static_cast<int>(tiles_of(job.k, WgmmaTile::kK));
  RingPlace place{0, 0};
  for_own_tiles(job.finish, [&](int64_t row, int64_t column) {
    for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
      wait_for_barrier(ring.empty(place.stage), place.phase ^ 1);
      const uint32_t full = ring.full(place.stage);
      arrive_expecting(full, WgmmaTile::kStageBytes);  // bytes outside the matrix are counted too
      copy_box(ring.a(place.stage), a_map, k_tile * WgmmaTile::kK, static_cast<int>(row), full);
      copy_box(ring.b(place.stage), b_map, k_tile * WgmmaTile::kK, static_cast<int>(column), full);
      place = next_place(place, WgmmaTile::kStages);
    }
  });
}

// Starts the products of a stage: sums = or += its 64 rows of a times b, of which the descriptors are.
template <DType kA, DType kB>
__device__ __forceinline__ void multiply_stage(SumOf<kA> (&sums)[16][4], uint64_t a, uint64_t b, bool adds) {
  hold(sums);
  fence_products();
  SQ_UNROLL
  for (int k = 0; k < WgmmaTile::kK; k += kMmaK) {
    multiply_async<kA, kB>(sums, advance_descriptor(a, k), advance_descriptor(b, k), adds || k > 0);
  }
  commit_products();
}

// A warp is done with a stage.
__device__ __forceinline__ void give_back(const WgmmaRing& ring, int stage) {
  if (threadIdx.x % 32 == 0) arrive(ring.empty(stage));
}

// The warpgroups that multiply.
template <DType kA, DType kB>
__device__ __forceinline__ void empty_ring(const WgmmaRing& ring, const TileJob& job) {
  using Sum = SumOf<kA>;
  const int first = static_cast<int>(threadIdx.x) / 128 * 64;  // row of the tile
  const auto a_offset = static_cast<uint32_t>(first * WgmmaTile::kK);
  const auto k_tiles = static_cast<int>(tiles_of(job.k, WgmmaTile::kK));
  RingPlace place{0, 0};
  for_own_tiles(job.finish, [&](int64_t row, int64_t column) {
    Sum sums[1][16][4] = {};
    int before = 0;  // the stage whose products are under way
    for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
      wait_for_barrier(ring.full(place.stage), place.phase);
      const uint64_t a = matrix_descriptor(ring.a(place.stage) + a_offset), b = matrix_descriptor(ring.b(place.stage));
      if constexpr (kA == DType::kInt8) {
        multiply_stage<kA, kB>(sums[0], a, b, k_tile > 0);
        wait_for_products<1>();
        if (k_tile > 0) give_back(ring, before);
        before = place.stage;
      } else {
        Sum part[16][4];
        multiply_stage<kA, kB>(part, a, b, false);
        wait_for_products<0>();
        hold(part);
        give_back(ring, place.stage);
        SQ_UNROLL
        for (int i = 0; i < 64; ++i) sums[0][i / 4][i % 4] += part[i / 4][i % 4];
      }
      place = next_place(place, WgmmaTile::kStages);
    }
    if constexpr (kA == DType::kInt8) {
      wait_for_products<0>();
      hold(sums[0]);
      give_back(ring, before);
    }
    const int warp_row = static_cast<int>(threadIdx.x) / 32 % 4 * 16;
    store_tile(job.finish, row + first + warp_row, column, sums);
  });
}

// Grid: any number of blocks, as many as there are multiprocessors; threads and shared memory of WgmmaTile.
template <DType kA, DType kB>
__global__ void __launch_bounds__(WgmmaTile::kThreads, 1)
    wgmma_gemm_kernel(TileJob job, const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map) {
  if constexpr (!has_wgmma()) {
    trap();
  } else {
    SQ_DYNAMIC_SHARED(uint8_t, room);
    const WgmmaRing ring = wgmma_ring(shared_address(room));
    constexpr unsigned kMultipliers = WgmmaTile::kWarpgroups * 128;
    if (threadIdx.x == 0) {
      for (int stage = 0; stage < WgmmaTile::kStages; ++stage) {
        init_barrier(ring.full(stage), 1);
        init_barrier(ring.empty(stage), kMultipliers / 32);
      }
      fence_barriers();
      prefetch_map(a_map);
      prefetch_map(b_map);
    }
    __syncthreads();
    if (threadIdx.x < kMultipliers) {
      empty_ring<kA, kB>(ring, job);
    } else if (threadIdx.x == kMultipliers) {
      fill_ring(ring, job, a_map, b_map);
    }
  }
}

}  // namespace sq
