// The index maps of the tensor-core products, each exhaustively: against the formulas of NVIDIA's PTX ISA, written here as
// they stand there; as one-to-one maps; and for bank conflicts.
#include "cuda/kernels/tile_maps.h"

#include <algorithm>
#include <set>
#include <utility>
#include <vector>

#include "native/testing.h"

namespace {

using namespace sq;

bool equals(MatrixPlace place, int row, int column) { return place.row == row && place.column == column; }

// "Matrix Fragments for mma.m16n8k32" (.u8 / .s8 and fp8 types), with its names.
void test_mma_fragments() {
  std::set<std::pair<int, int>> a_seen, b_seen, c_seen;
  for (int laneid = 0; laneid < 32; ++laneid) {
    const int groupID = laneid >> 2, threadID_in_group = laneid % 4;
    for (int i = 0; i < 16; ++i) {  // a_i is byte i % 4 of register i / 4
      const int row = (0 <= i && i < 4) || (8 <= i && i < 12) ? groupID : groupID + 8;
      const int col = i < 8 ? threadID_in_group * 4 + (i & 0x3) : threadID_in_group * 4 + (i & 0x3) + 16;
      CHECK(equals(fragment_a(laneid, i / 4, i % 4), row, col), "a%d of lane %d", i, laneid);
      a_seen.emplace(row, col);
    }
    for (int i = 0; i < 8; ++i) {
      const int row = i < 4 ? threadID_in_group * 4 + (i & 0x3) : threadID_in_group * 4 + (i & 0x3) + 16;
      CHECK(equals(fragment_b(laneid, i / 4, i % 4), row, groupID), "b%d of lane %d", i, laneid);
      b_seen.emplace(row, groupID);
    }
    for (int i = 0; i < 4; ++i) {
      const int row = i < 2 ? groupID : groupID + 8, col = threadID_in_group * 2 + (i & 0x1);
      CHECK(equals(fragment_c(laneid, i), row, col), "c%d of lane %d", i, laneid);
      c_seen.emplace(row, col);
    }
  }
  CHECK(a_seen.size() == 16 * 32 && b_seen.size() == 32 * 8 && c_seen.size() == 16 * 8, "every place once");
}

// "ldmatrix": thread 8 i + r holds the address of row r of matrix i; afterwards lane l has in register i the two 16-bit
// elements 2 * (l % 4) and + 1 of row l / 4 of matrix i. So byte j of it is byte 4 * (l % 4) + j of that row.
void test_ldmatrix() {
  for (int lane = 0; lane < 32; ++lane) {
    for (int reg = 0; reg < 4; ++reg) {
      const int giver = 8 * reg + lane / 4;
      for (int byte = 0; byte < 4; ++byte) {
        const ChunkPlace a = ldmatrix_a(giver), b = ldmatrix_b(giver);
        const int within = 4 * (lane % 4) + byte;
        CHECK(equals(fragment_a(lane, reg, byte), a.row, a.chunk * kChunk + within), "lane %d", lane);
        const MatrixPlace own = fragment_b(lane, reg % 2, byte);  // registers 2 and 3 are the next 8 columns
        CHECK(b.row == own.column + reg / 2 * 8 && b.chunk * kChunk + within == own.row, "lane %d", lane);
      }
    }
  }
}

// Shared memory has 32 banks of 4 bytes; what moves 16 bytes a thread goes 8 threads at a time.
bool is_free_of_conflicts(const std::vector<uint32_t>& addresses) {
  std::set<uint32_t> banks;
  for (uint32_t address : addresses) banks.insert(address / 16 % 8);
  return banks.size() == addresses.size();
}

void test_swizzle_64() {
  constexpr int kChunks = MmaTile::kK / kChunk;
  std::set<uint32_t> seen, copied;
  for (int row = 0; row < MmaTile::kM; ++row) {
    for (int chunk = 0; chunk < kChunks; ++chunk) seen.insert(swizzle_64(row, chunk));
  }
  CHECK(seen.size() == MmaTile::kM * kChunks, "one to one");
  CHECK(*seen.rbegin() == MmaTile::kM * MmaTile::kK - kChunk, "within the tile");

  // Every chunk is copied once, 8 threads at a time to different banks.
  for (int turn = 0; turn < MmaTile::kM * kChunks / MmaTile::kThreads; ++turn) {
    for (int first = 0; first < MmaTile::kThreads; first += 8) {
      std::vector<uint32_t> together;
      for (int thread = first; thread < first + 8; ++thread) {
        const ChunkPlace place = copied_chunk(thread, turn);
        CHECK(place.row < MmaTile::kM && place.chunk < kChunks, "thread %d", thread);
        together.push_back(swizzle_64(place.row, place.chunk));
        copied.insert(together.back());
      }
      CHECK(is_free_of_conflicts(together), "copies of threads from %d on", first);
    }
  }
  CHECK(copied == seen, "all is copied");

  // The four matrices of an ldmatrix, each 8 rows, wherever the kernel reads them.
  for (int row = 0; row < MmaTile::kM; row += 16) {
    for (int chunk = 0; chunk < kChunks; chunk += 2) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        std::vector<uint32_t> a, b;
        for (int lane = 8 * matrix; lane < 8 * matrix + 8; ++lane) {
          a.push_back(swizzle_64(row + ldmatrix_a(lane).row, chunk + ldmatrix_a(lane).chunk));
          b.push_back(swizzle_64(row + ldmatrix_b(lane).row, chunk + ldmatrix_b(lane).chunk));
        }
        CHECK(is_free_of_conflicts(a) && is_free_of_conflicts(b), "row %d, matrix %d", row, matrix);
      }
    }
  }
}

void test_swizzle_128() {
  std::set<uint32_t> seen;
  for (uint32_t address = 0; address < WgmmaTile::kM * 128; ++address) {
    const uint32_t swizzled = swizzle_128(address), row = address / 128, chunk = address / 16 % 8;
    // The table of the 128-byte swizzle: chunk c of row r lies at chunk c ^ (r % 8) of that row.
    CHECK(swizzled == row * 128 + (chunk ^ row % 8) * 16 + address % 16, "address %u", address);
    CHECK(swizzle_128(swizzled) == address, "its own inverse");
    seen.insert(swizzled);
  }
  CHECK(seen.size() == WgmmaTile::kM * 128, "one to one");
  for (uint32_t row = 0; row < WgmmaTile::kM; row += 8) {
    for (uint32_t chunk = 0; chunk < 8; ++chunk) {
      std::vector<uint32_t> together;
      for (uint32_t r = row; r < row + 8; ++r) together.push_back(swizzle_128(r * 128 + chunk * 16));
      CHECK(is_free_of_conflicts(together), "row %u", row);
    }
  }
}

void test_wgmma() {
  // "Register Fragments" of wgmma.m64nNk32, accumulator D: the figure's rows and columns.
  std::set<std::pair<int, int>> seen;
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < WgmmaTile::kN / 2; ++i) {
      const int row = 16 * (thread / 32) + thread % 32 / 4 + 8 * (i / 2 % 2);
      const int column = 8 * (i / 4) + 2 * (thread % 4) + i % 2;
      CHECK(equals(fragment_d(thread, i), row, column), "d%d of thread %d", i, thread);
      CHECK(equals(fragment_d(thread + 128, i), row, column), "the second warpgroup");
      seen.emplace(row, column);
    }
  }
  CHECK(seen.size() == 64 * WgmmaTile::kN, "every place once");

  // "Matrix Descriptor Format", field by field, for every address that the kernel gives.
  constexpr uint32_t kMostShared = 227 * 1024;
  for (uint32_t tile = 1024; tile < kMostShared; tile += 64 * 128) {
    for (uint32_t k = 0; k < 128; k += 32) {
      const uint64_t descriptor = advance_descriptor(matrix_descriptor(tile), static_cast<int>(k));
      CHECK((descriptor & 0x3fff) == (tile + k) >> 4, "bits 13-0: start address");
      CHECK((descriptor >> 14 & 3) == 0, "bits 15-14");
      CHECK((descriptor >> 16 & 0x3fff) == 1, "bits 29-16: leading dimension, assumed to be 1");
      CHECK((descriptor >> 32 & 0x3fff) == 1024 >> 4, "bits 45-32: 8 rows to the next 8");
      CHECK((descriptor >> 46 & 0x7) == 0, "bits 48-46");
      CHECK((descriptor >> 49 & 0x7) == 0, "bits 51-49: the pattern begins at a multiple of 1024");
      CHECK(descriptor >> 52 == 1 << 10, "bits 63-62: 128-byte swizzle");
    }
  }
}

void test_tiles() {
  for (int64_t rows : {1, 2, 7, 8, 9, 16, 37}) {
    for (int64_t columns : {1, 2, 3, 8, 33}) {
      std::set<std::pair<int64_t, int64_t>> seen;
      for (int64_t index = 0; index < rows * columns; ++index) {
        const TilePlace place = tile_place(index, rows, columns);
        CHECK(place.row >= 0 && place.row < rows && place.column >= 0 && place.column < columns, "%" PRId64, index);
        seen.emplace(place.row, place.column);
      }
      CHECK(seen.size() == static_cast<size_t>(rows * columns), "every tile once");
    }
  }
  // 16 blocks in sequence read 8 + 2 tiles of operands and not 16 + 1.
  std::set<int64_t> rows, columns;
  for (int64_t index = 16; index < 32; ++index) {
    rows.insert(tile_place(index, 64, 64).row);
    columns.insert(tile_place(index, 64, 64).column);
  }
  CHECK(rows.size() == 8 && columns.size() == 2, "neighbours");
}

void test_splits() {
  for (int k_tiles : {1, 2, 7, 32, 1041}) {
    for (int splits = 1; splits <= std::min(k_tiles, 16); ++splits) {
      int next = 0;
      for (int split = 0; split < splits; ++split) {
        const SplitRange range = split_range(k_tiles, splits, split);
        CHECK(range.begin == next && range.end > next, "%d of %d of %d", split, splits, k_tiles);
        CHECK(range.end - range.begin <= (k_tiles + splits - 1) / splits, "shared evenly");
        next = range.end;
      }
      CHECK(next == k_tiles, "all of k");
    }
  }
}

// A ring of barriers that one side fills and the other empties, in any order of the two: whoever may go on may go on
// rightly. Barriers count phases; waiting for a parity is over once the phase of that parity is complete.
void test_ring() {
  for (int stages = 1; stages <= 5; ++stages) {
    for (int seed = 0; seed < 200; ++seed) {
      std::vector<uint32_t> full(static_cast<size_t>(stages)), empty(full);  // phases that are complete
      const auto is_over = [](uint32_t complete, uint32_t parity) { return (complete & 1) != parity; };
      std::vector<int> holds(full.size(), -1);
      RingPlace filler{0, 0}, consumer{0, 0};
      int filled = 0, consumed = 0;
      while (consumed < 40) {
        if (random_int(0, 1) != 0) {
          const auto stage = static_cast<size_t>(filler.stage);
          if (!is_over(empty[stage], filler.phase ^ 1)) continue;
          CHECK(holds[stage] == -1, "a stage is filled before it is empty");
          holds[stage] = filled++;
          ++full[stage];
          filler = next_place(filler, stages);
        } else {
          const auto stage = static_cast<size_t>(consumer.stage);
          if (!is_over(full[stage], consumer.phase)) continue;
          CHECK(holds[stage] == consumed, "stage %zu holds %d, not %d", stage, holds[stage], consumed);
          holds[stage] = -1;
          ++consumed;
          ++empty[stage];
          consumer = next_place(consumer, stages);
        }
        CHECK(filled - consumed <= stages, "no more than there is room for");
      }
      CHECK(filled >= consumed, "nothing is consumed twice");
    }
  }
}

static_assert(MmaTile::kThreads == 256 && MmaTile::kSharedBytes == 48 * 1024);
static_assert(2 * (MmaTile::kSharedBytes + 1024) <= 100 * 1024, "two blocks on 8.6 and 8.9; 1 KB each is the system's");
static_assert(WgmmaTile::kThreads == 288 && WgmmaTile::kSharedBytes <= 227 * 1024);
static_assert(SwapTile::kThreads == 288 && SwapTile::kSharedBytes <= 227 * 1024 && SwapTile::kRows == SwapTile::kN);
static_assert(WgmmaTile::kStageBytes % 1024 == 0 && SwapTile::kStageBytes % 1024 == 0, "tiles begin with the pattern");
static_assert(WgmmaTile::kRows * WgmmaTile::kK % 1024 == 0 && SwapTile::kRows * SwapTile::kK % 1024 == 0);
static_assert(tiles_of(0, 128) == 0 && tiles_of(1, 128) == 1 && tiles_of(128, 128) == 1 && tiles_of(129, 128) == 2);

}  // namespace

int main() {
  test_mma_fragments();
  test_ldmatrix();
  test_swizzle_64();
  test_swizzle_128();
  test_wgmma();
  test_tiles();
  test_splits();
  test_ring();
}
