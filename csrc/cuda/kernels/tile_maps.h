// Where everything lies in the tensor-core products: tiles of y, bytes in shared memory, values in registers, stages of a
// pipeline. Pure functions, which the kernels index with, tests check exhaustively and the emulation of the instructions
// reads back. The names of sections are those of NVIDIA's PTX ISA.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/dtypes.h"

namespace sq {

// --- tiles ----------------------------------------------------------------------------------------------------------

// mma.cuh: 8 warps, each with kWarpM x kWarpN of y. Three stages of the larger tile are 48 KB: two blocks fit into every
// multiprocessor from 8.0 on, and no launch has to ask for more shared memory than is free.
template <int kTileM>
struct MmaShape {
  static constexpr int kM = kTileM, kN = 128, kK = 64;  // k in bytes, which are values
  static constexpr int kStages = 3;
  static constexpr int kThreads = 256;
  static constexpr int kWarpM = kM < 64 ? 32 : 64, kWarpN = kM / kWarpM * kN * 32 / kThreads;
  static constexpr int kStageBytes = (kM + kN) * kK;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  // Blocks that a multiprocessor holds: the registers of a second set of sums, of fp8, leave room for one.
  static constexpr int blocks_together(bool is_fp8) { return is_fp8 && kM > 32 ? 1 : 2; }
};
using MmaTile = MmaShape<128>;  // warps 2 x 4, with 64 x 32 of y each

// wgmma.cuh: two warpgroups that multiply, each with 64 of the rows of what wgmma computes, and one warp that loads.
// Swapped, those rows are the columns of y: weights fill wgmma's 64 rows when there are few tokens, and tokens are its
// columns, of which it takes any multiple of 8.
template <int kTileM, int kTileN, int kRingStages, bool kSwapped>
struct WgmmaShape {
  static constexpr bool kIsSwapped = kSwapped;
  static constexpr int kM = kTileM, kN = kTileN;  // of y
  static constexpr int kK = 128;                  // a row of k is the 128 bytes of a swizzled line
  static constexpr int kRows = kSwapped ? kN : kM, kColumns = kSwapped ? kM : kN;
  static constexpr int kStages = kRingStages;
  static constexpr int kWarpgroups = kRows / 64;
  static constexpr int kThreads = kWarpgroups * 128 + 32;
  static constexpr int kStageBytes = (kRows + kColumns) * kK;
  static constexpr int kAlignment = 1024;                // where the pattern of the swizzle begins anew
  static constexpr int kBarrierBytes = kStages * 2 * 8;  // full and empty, for each stage
  static constexpr int kSharedBytes = kAlignment + kStages * kStageBytes + kBarrierBytes;
};
using WgmmaTile = WgmmaShape<128, 128, 4, false>;
// Up to 64 tokens. Memory is what such a product waits for: 6 stages of 16 KB of weights keep its latency filled.
using SwapTile = WgmmaShape<64, 128, 6, true>;

constexpr int kMmaK = 32;  // values of k that one instruction takes, of either kind

struct TilePlace {
  int64_t row, column;  // in tiles
};

SQ_HOST_DEVICE constexpr int64_t tiles_of(int64_t size, int tile) { return (size + tile - 1) / tile; }

// Tile number `index` of rows x columns of them. Blocks that run at one time take neighbouring tiles, 8 rows of them
// column by column, so that they share operands in L2. Index: what holds their number; 64-bit divisions are slow on a GPU.
template <typename Index = int64_t>
SQ_HOST_DEVICE constexpr TilePlace tile_place(std::common_type_t<Index> index, std::common_type_t<Index> rows,
                                              std::common_type_t<Index> columns) {
  constexpr Index kBand = 8;
  const Index band = index / (kBand * columns), first = band * kBand;
  const Index height = rows - first < kBand ? rows - first : kBand;
  const Index within = index - first * columns;
  return {first + within % height, within / height};
}

// A part of k for each of `splits` blocks that share a tile of y, in tiles of k: at least one each, if there are so many.
struct SplitRange {
  int begin, end;
};

SQ_HOST_DEVICE constexpr SplitRange split_range(int k_tiles, int splits, int split) {
  return {static_cast<int>(int64_t{k_tiles} * split / splits),
          static_cast<int>(int64_t{k_tiles} * (split + 1) / splits)};
}

// --- shared memory --------------------------------------------------------------------------------------------------

constexpr int kChunk = 16;  // bytes that cp.async and a row of ldmatrix move

struct ChunkPlace {
  int row, chunk;
};

// What thread `thread` copies in turn `turn` of a tile with rows of MmaTile::kK bytes; those past the rows of a lower tile are nothing.
SQ_HOST_DEVICE constexpr ChunkPlace copied_chunk(int thread, int turn) {
  constexpr int kChunks = MmaTile::kK / kChunk;
  return {thread / kChunks + turn * (MmaTile::kThreads / kChunks), thread % kChunks};
}

// The byte at which a chunk lies in a tile with rows of 64 bytes. Two rows are a line of all 32 banks; chunks change
// places within a row by the number of the line, so that any 8 rows in sequence give their chunk from different banks.
SQ_HOST_DEVICE constexpr uint32_t swizzle_64(int row, int chunk) {
  return static_cast<uint32_t>(row * 64 + (chunk ^ (row >> 1 & 3)) * kChunk);
}

// The 128-byte swizzle of TMA and wgmma ("Swizzle<3, 4, 3>"): bits 4 to 6 of a shared memory address are xored with bits 7
// to 9, which are the row in a tile with rows of 128 bytes that begins at a multiple of 1024.
SQ_HOST_DEVICE constexpr uint32_t swizzle_128(uint32_t address) { return address ^ (address >> 3 & 0x70); }

// --- "Matrix Fragments for mma.m16n8k32": rows and columns of a lane's values ------------------------------------------

struct MatrixPlace {
  int row, column;
};

// Byte `byte` of register `reg`, of a [16, k = 32].
SQ_HOST_DEVICE constexpr MatrixPlace fragment_a(int lane, int reg, int byte) {
  return {lane / 4 + reg % 2 * 8, lane % 4 * 4 + reg / 2 * 16 + byte};
}

// Of b [k = 32, 8].
SQ_HOST_DEVICE constexpr MatrixPlace fragment_b(int lane, int reg, int byte) {
  return {lane % 4 * 4 + reg * 16 + byte, lane / 4};
}

// Value `index` of c or d [16, 8].
SQ_HOST_DEVICE constexpr MatrixPlace fragment_c(int lane, int index) {
  return {lane / 4 + index / 2 * 8, lane % 4 * 2 + index % 2};
}

// ldmatrix.x4: lane l gives the address of row l % 8 of matrix l / 8, and gets bytes 4 * (l % 4) to + 3 of row l / 4 of
// matrix r in register r. With these addresses the registers are fragments of a: rows, chunks of a [16, k = 32] ...
SQ_HOST_DEVICE constexpr ChunkPlace ldmatrix_a(int lane) { return {lane % 16, lane / 16}; }
// ... and of two neighbouring b, whose columns are rows of the weight: [16, k = 32], registers 0 and 1, then 2 and 3.
SQ_HOST_DEVICE constexpr ChunkPlace ldmatrix_b(int lane) { return {lane % 8 + lane / 16 * 8, lane / 8 % 2}; }

// --- wgmma ----------------------------------------------------------------------------------------------------------

// "Matrix Fragments for wgmma.mma_async.m64nNk32": value `index` of d [64, n] of a thread of the warpgroup: each warp has
// 16 rows, in fragments of 8 columns as fragment_c.
SQ_HOST_DEVICE constexpr MatrixPlace fragment_d(int thread, int index) {
  const MatrixPlace place = fragment_c(thread % 32, index % 4);
  return {thread / 32 % 4 * 16 + place.row, index / 4 * 8 + place.column};
}

// "Matrix Descriptor Format", of rows of k in 128 bytes each with the 128-byte swizzle. `address` is where the first row
// begins, a multiple of 1024.
SQ_HOST_DEVICE constexpr uint64_t matrix_descriptor(uint32_t address) {
  constexpr uint64_t kLeading = 1;            // not used in a swizzled layout, assumed to be 1
  constexpr uint64_t kStride = 8 * 128 >> 4;  // from 8 rows to the next 8
  constexpr uint64_t kSwizzle128 = 1;
  return (address & 0x3ffff) >> 4 | kLeading << 16 | kStride << 32 | kSwizzle128 << 62;
}

// Of the same rows, some multiple of 16 bytes of k further in the same 128.
SQ_HOST_DEVICE constexpr uint64_t advance_descriptor(uint64_t descriptor, int k) {
  return descriptor + static_cast<uint64_t>(k >> 4);
}

// --- pipelines ------------------------------------------------------------------------------------------------------

// Where a ring of stages stands: the stage, and the parity of the phase that its barriers are waited on with. Whoever
// consumes waits for `phase` of a full barrier, whoever fills for the other parity of an empty one, which a barrier that
// has completed no phase yet counts as complete.
struct RingPlace {
  int stage;
  uint32_t phase;
};

SQ_HOST_DEVICE constexpr RingPlace next_place(RingPlace place, int stages) {
  return place.stage + 1 < stages ? RingPlace{place.stage + 1, place.phase} : RingPlace{0, place.phase ^ 1};
}

}  // namespace sq
