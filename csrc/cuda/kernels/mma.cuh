// 8-bit product on tensor cores through mma.sync, y = cast((a @ b.T) * (a_scale * b_scale) + bias), for GPUs from 8.0 on.
// a [m, k] and b [n, k], k a multiple of 16, both beginning at multiples of 16 bytes; any m and n.
//
// A block computes a tile of y, MmaTile. Its operands come by cp.async, two tiles of k ahead of the one that is being
// multiplied, into rows of 64 bytes whose 16-byte chunks are swizzled (swizzle_64): ldmatrix reads them without bank
// conflicts. Bytes past the last row or the end of k are zeros, which add nothing. Each warp keeps 64 x 32 sums in
// registers and finishes them there.
// Bytes moved: n * k once for every 128 rows of a and m * k once for every 128 rows of b, through L2; m * n * sizeof(Y).
//
// INT8 sums are exact int32. Tensor cores keep about 14 bits of sums of fp8 products (DeepSeek-V3's report, 3.3.2), so sums
// of each tile of k are added up in fp32 outside of them.
#pragma once

#include "cuda/kernels/group.cuh"
#include "cuda/kernels/mma_instructions.cuh"
#include "cuda/kernels/store_tile.cuh"
#include "cuda/kernels/tile_gemm.h"

namespace sq {

// Starts copying the tile of k from `first_k` on of 128 rows from `first_row` on.
__device__ __forceinline__ void copy_tile(uint32_t target, const uint8_t* matrix, int64_t rows, int64_t k,
                                          int64_t first_row, int64_t first_k) {
  constexpr int kTurns = MmaTile::kM * MmaTile::kK / kChunk / MmaTile::kThreads;
  static_assert(MmaTile::kM == MmaTile::kN);
  SQ_UNROLL
  for (int turn = 0; turn < kTurns; ++turn) {
    const ChunkPlace place = copied_chunk(static_cast<int>(threadIdx.x), turn);
    const int64_t row = first_row + place.row, byte = first_k + place.chunk * kChunk;
    const bool is_there = row < rows && byte < k;
    copy_async(target + swizzle_64(place.row, place.chunk), is_there ? matrix + row * k + byte : matrix, is_there);
  }
}

// Sums of a warp += its rows of a tile of a, times its rows of a tile of b.
template <DType kA, DType kB, int kM, int kN>
__device__ __forceinline__ void multiply_tile(SumOf<kA> (&sums)[kM][kN][4], uint32_t a_tile, uint32_t b_tile,
                                              int first_m, int first_n) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const ChunkPlace a_own = ldmatrix_a(lane), b_own = ldmatrix_b(lane);
  SQ_UNROLL
  for (int chunk = 0; chunk < MmaTile::kK / kChunk; chunk += kMmaK / kChunk) {
    uint32_t a[kM][4], b[kN / 2][4];
    SQ_UNROLL
    for (int i = 0; i < kM; ++i) {
      load_matrices(a[i], a_tile + swizzle_64(first_m + i * 16 + a_own.row, chunk + a_own.chunk));
    }
    SQ_UNROLL
    for (int j = 0; j < kN / 2; ++j) {
      load_matrices(b[j], b_tile + swizzle_64(first_n + j * 16 + b_own.row, chunk + b_own.chunk));
    }
    SQ_UNROLL
    for (int i = 0; i < kM; ++i) {
      SQ_UNROLL
      for (int j = 0; j < kN; ++j) multiply<kA, kB>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
}

// Grid: a block per tile of y; threads and shared memory of MmaTile.
template <DType kA, DType kB>
__global__ void __launch_bounds__(MmaTile::kThreads, MmaTile::blocks_together(kA != DType::kInt8))
    mma_gemm_kernel(TileJob job) {
  if constexpr (!has_mma<kA>()) {
    trap();
  } else {
    using Tile = MmaTile;
    using Sum = SumOf<kA>;
    constexpr int kM = Tile::kWarpM / 16, kN = Tile::kWarpN / 8;
    SQ_DYNAMIC_SHARED(uint8_t, room);
    const uint32_t stages = shared_address(room);
    const Epilogue& epilogue = job.epilogue;
    const TilePlace place = tile_place(blockIdx.x, tiles_of(epilogue.m, Tile::kM), tiles_of(epilogue.n, Tile::kN));
    const int64_t row = place.row * Tile::kM, column = place.column * Tile::kN;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    const int first_m = warp % (Tile::kM / Tile::kWarpM) * Tile::kWarpM;
    const int first_n = warp / (Tile::kM / Tile::kWarpM) * Tile::kWarpN;
    const auto k_tiles = static_cast<int>(tiles_of(job.k, Tile::kK));
    const auto copy_stage = [&](int k_tile) {
      if (k_tile < k_tiles) {
        const uint32_t stage = stages + static_cast<uint32_t>(k_tile % Tile::kStages * Tile::kStageBytes);
        const int64_t first_k = static_cast<int64_t>(k_tile) * Tile::kK;
        copy_tile(stage, job.a, epilogue.m, job.k, row, first_k);
        copy_tile(stage + Tile::kM * Tile::kK, job.b, epilogue.n, job.k, column, first_k);
      }
      commit_copies();  // past the end an empty group, so that the count of groups stays that of tiles
    };

    Sum sums[kM][kN][4] = {};
    SQ_UNROLL
    for (int k_tile = 0; k_tile < Tile::kStages - 1; ++k_tile) copy_stage(k_tile);
    for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
      wait_for_copies<Tile::kStages - 2>();
      __syncthreads();  // everybody's copies of this tile are there, and everybody is done with the one before
      copy_stage(k_tile + Tile::kStages - 1);
      const uint32_t stage = stages + static_cast<uint32_t>(k_tile % Tile::kStages * Tile::kStageBytes);
      if constexpr (kA == DType::kInt8) {
        multiply_tile<kA, kB>(sums, stage, stage + Tile::kM * Tile::kK, first_m, first_n);
      } else {
        Sum part[kM][kN][4] = {};
        multiply_tile<kA, kB>(part, stage, stage + Tile::kM * Tile::kK, first_m, first_n);
        SQ_UNROLL
        for (int i = 0; i < kM * kN * 4; ++i)
          sums[i / 4 / kN][i / 4 % kN][i % 4] += part[i / 4 / kN][i / 4 % kN][i % 4];
      }
    }
    wait_for_copies<0>();
    store_tile(epilogue, row + first_m, column + first_n, sums);
  }
}

}  // namespace sq
