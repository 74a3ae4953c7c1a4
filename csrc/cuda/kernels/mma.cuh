// 8-bit product on tensor cores through mma.sync, y = cast((a @ b.T) * (a_scale * b_scale) + bias), for GPUs from 8.0 on.
// a [m, k] and b [n, k], k a multiple of 16, both beginning at multiples of 16 bytes; any m and n.
//
// A block computes a tile of y, MmaShape. Its operands come by cp.async, two tiles of k ahead of the one that is being
// multiplied, into rows of 64 bytes whose 16-byte chunks are swizzled (swizzle_64): ldmatrix reads them without bank
// conflicts. Bytes past the end of k are zeros, which add nothing. Each warp keeps 64 x 32 sums (64 x 16 or 32 x 16 of
// lower tiles) in registers and finishes them there.
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

// The rows that a thread copies chunks of, turn by turn. Those past the last repeat it, and their sums are not stored.
template <int kRows>
struct TileSource {
  static constexpr int kPerTurn = MmaTile::kThreads * kChunk / MmaTile::kK;  // rows that all threads copy together
  static constexpr int kTurns = (kRows + kPerTurn - 1) / kPerTurn;
  const uint8_t* rows[kTurns];
};

// Of rows `first` to first + kRows of `count`; row_of: the row of the matrix that each of them is.
template <int kRows, typename RowOf>
__device__ __forceinline__ TileSource<kRows> tile_source(const uint8_t* matrix, int64_t count, int64_t k, int64_t first,
                                                         const RowOf& row_of) {
  TileSource<kRows> source;
  SQ_UNROLL
  for (int turn = 0; turn < source.kTurns; ++turn) {
    const int64_t row = first + copied_chunk(static_cast<int>(threadIdx.x), turn).row;
    source.rows[turn] = matrix + row_of(row < count ? row : count - 1) * k;
  }
  return source;
}

// Starts copying the tile of k from `first_k` on.
template <int kRows>
__device__ __forceinline__ void copy_tile(uint32_t target, const TileSource<kRows>& source, int64_t k,
                                          int64_t first_k) {
  SQ_UNROLL
  for (int turn = 0; turn < source.kTurns; ++turn) {
    const ChunkPlace place = copied_chunk(static_cast<int>(threadIdx.x), turn);
    if (kRows % source.kPerTurn != 0 && place.row >= kRows) break;
    const int64_t byte = first_k + place.chunk * kChunk;
    const bool is_there = byte < k;
    copy_async(target + swizzle_64(place.row, place.chunk), source.rows[turn] + (is_there ? byte : 0), is_there);
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

// The sums of a warp: fragments of 16 x 8 of its part of a tile of y.
template <DType kA, typename Tile>
struct MmaSums {
  static constexpr int kM = Tile::kWarpM / 16, kN = Tile::kWarpN / 8;
  SumOf<kA> at[kM][kN][4];
};

// Where in a tile of y the calling warp's part begins.
template <typename Tile>
__device__ __forceinline__ MatrixPlace warp_place() {
  constexpr int kWarpsDown = Tile::kM / Tile::kWarpM;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  return {warp % kWarpsDown * Tile::kWarpM, warp / kWarpsDown * Tile::kWarpN};
}

// The sums of the tile of y at (row, column), by all threads of a block. Rows: see row_map.cuh.
template <DType kA, DType kB, typename Tile, typename Rows>
__device__ __forceinline__ void mma_sums(MmaSums<kA, Tile>& sums, const TileJob& job, const Rows& rows, int64_t row,
                                         int64_t column) {
  SQ_DYNAMIC_SHARED(uint8_t, room);
  const uint32_t stages = shared_address(room);
  const Epilogue& epilogue = job.epilogue;
  const MatrixPlace own = warp_place<Tile>();
  const auto k_tiles = static_cast<int>(tiles_of(job.k, Tile::kK));
  const auto a = tile_source<Tile::kM>(job.a, epilogue.m, job.k, row, [&](int64_t each) { return rows.input(each); });
  const auto b = tile_source<Tile::kN>(job.b, epilogue.n, job.k, column, [](int64_t each) { return each; });
  const auto copy_stage = [&](int k_tile) {
    if (k_tile < k_tiles) {
      const uint32_t stage = stages + static_cast<uint32_t>(k_tile % Tile::kStages * Tile::kStageBytes);
      const int64_t first_k = static_cast<int64_t>(k_tile) * Tile::kK;
      copy_tile(stage, a, job.k, first_k);
      copy_tile(stage + Tile::kM * Tile::kK, b, job.k, first_k);
    }
    commit_copies();  // past the end an empty group, so that the count of groups stays that of tiles
  };

  sums = {};
  SQ_UNROLL
  for (int k_tile = 0; k_tile < Tile::kStages - 1; ++k_tile) copy_stage(k_tile);
  for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
    wait_for_copies<Tile::kStages - 2>();
    __syncthreads();  // everybody's copies of this tile are there, and everybody is done with the one before
    copy_stage(k_tile + Tile::kStages - 1);
    const uint32_t stage = stages + static_cast<uint32_t>(k_tile % Tile::kStages * Tile::kStageBytes);
    if constexpr (kA == DType::kInt8) {
      multiply_tile<kA, kB>(sums.at, stage, stage + Tile::kM * Tile::kK, own.row, own.column);
    } else {
      MmaSums<kA, Tile> part = {};
      multiply_tile<kA, kB>(part.at, stage, stage + Tile::kM * Tile::kK, own.row, own.column);
      constexpr int kN = sums.kN;
      SQ_UNROLL
      for (int i = 0; i < sums.kM * kN * 4; ++i) {
        sums.at[i / 4 / kN][i / 4 % kN][i % 4] += part.at[i / 4 / kN][i / 4 % kN][i % 4];
      }
    }
  }
  wait_for_copies<0>();
}

// Grid: a block per tile of y; threads and shared memory of MmaTile.
template <DType kA, DType kB>
__global__ void __launch_bounds__(MmaTile::kThreads, MmaTile::blocks_together(kA != DType::kInt8))
    mma_gemm_kernel(TileJob job) {
  if constexpr (!has_mma<kA>()) {
    trap();
  } else {
    using Tile = MmaTile;
    const TilePlace place =
        tile_place(blockIdx.x, tiles_of(job.epilogue.m, Tile::kM), tiles_of(job.epilogue.n, Tile::kN));
    const int64_t row = place.row * Tile::kM, column = place.column * Tile::kN;
    MmaSums<kA, Tile> sums;
    mma_sums<kA, kB, Tile>(sums, job, AllRows{}, row, column);
    const MatrixPlace own = warp_place<Tile>();
    store_tile(job.epilogue, AllRows{}, row + own.row, column + own.column, sums.at);
  }
}

}  // namespace sq
