// What surrounds the experts' products on a GPU, run on the CPU: slots sorted by their expert against a stable sort, tiles
// of rows that cover each of them once, weighted sums against the same sums in plain loops; and the plan.
#include "native/cuda/cuda_shim.h"

// After the shim.
#include <algorithm>
#include <vector>

#include "cuda/compute/experts_plan.h"
#include "cuda/kernels/combine.cuh"
#include "cuda/kernels/route.cuh"
#include "native/testing.h"

namespace {

using namespace sq;

// Where the tiles of all experts begin, for every way to spread a few slots over a few of them.
void test_room_for_tiles() {
  for (int tile_rows : {1, 2, 8, 32, 128}) {
    for (int64_t before = 0; before < 300; ++before) {
      for (int64_t expert : {0, 1, 2, 7, 31, 200, 299}) {
        const int64_t first = first_row_tile(before, expert, tile_rows);
        CHECK(first <= before && first <= before / tile_rows + expert, "%" PRId64, first);
        for (int64_t count : {0, 1, 2, 7, 8, 9, 31, 32, 33, 127, 128, 129, 1000}) {
          const int64_t room = first_row_tile(before + count, expert + 1, tile_rows) - first;
          CHECK(room >= (count + tile_rows - 1) / tile_rows, "%" PRId64 " before, %" PRId64 " of %" PRId64, before,
                count, expert);
        }
      }
    }
  }
}

void test_route(const std::vector<int64_t>& chosen, int experts, int tile_rows) {
  const auto slots = static_cast<int64_t>(chosen.size());
  const Buffer<int64_t> index(slots);
  std::copy(chosen.begin(), chosen.end(), index.data());
  const int64_t tile_count = first_row_tile(slots, experts, tile_rows);
  const Buffer<int32_t> order(slots);
  const Buffer<RowTile> tiles(tile_count);
  std::fill_n(order.data(), slots, -1);
  std::fill_n(tiles.data(), tile_count, RowTile{-1, -1, -1});
  shim::run_grid(route_kernel, static_cast<unsigned>(experts), static_cast<unsigned>(route_threads(slots)), size_t{0},
                 RouteJob{index.data(), slots, experts, tile_rows, order.data(), tiles.data(), tile_count});

  std::vector<int32_t> expected;  // of all tiles
  for (int expert = 0; expert < experts; ++expert) {
    for (int64_t slot = 0; slot < slots; ++slot) {
      if (chosen[slot] == expert) expected.push_back(static_cast<int32_t>(slot));
    }
  }
  std::vector<int32_t> covered;
  for (int64_t i = 0; i < tile_count; ++i) {
    const RowTile& tile = tiles[i];
    CHECK(0 <= tile.expert && tile.expert < experts && 0 <= tile.rows && tile.rows <= tile_rows, "tile %" PRId64, i);
    for (int row = tile.first; row < tile.first + tile.rows; ++row) {
      CHECK(chosen[order[row]] == tile.expert, "slot %d is not of expert %d", order[row], tile.expert);
      covered.push_back(order[row]);
    }
  }
  CHECK(covered == expected, "%zu of %zu slots, %d experts", covered.size(), expected.size(), experts);
}

void test_routes() {
  for (int tile_rows : {1, 2, 4, 8, 32, 64, 128}) {
    test_route({0}, 1, tile_rows);
    test_route({1}, 1, tile_rows);  // nobody's
    test_route({3, 3, 3, 3}, 300, tile_rows);
    test_route({299, 0, 300, 150, 299}, 300, tile_rows);
    test_route({-1, 2, 0, 5, 4, 1000000000000}, 3, tile_rows);  // no experts, which a GPU cannot refuse
    for (int slots : {31, 32, 33, 127, 128, 129, 700, 2500}) {
      for (int experts : {1, 3, 17}) {
        std::vector<int64_t> chosen(slots);
        for (int64_t& each : chosen) each = random_int(0, experts);
        test_route(chosen, experts, tile_rows);
      }
    }
    test_route(std::vector<int64_t>(1000, 5), 9, tile_rows);  // all to one
    test_route(std::vector<int64_t>(1000, 9), 9, tile_rows);  // none to any
  }
}

template <typename Y, typename Weight>
void test_combine(int64_t tokens, int top_k, int64_t columns, bool is_aligned) {
  constexpr int kExperts = 5;
  const int64_t slots = tokens * top_k, offset = is_aligned ? 0 : 1;
  const Buffer<float> x = random_values<float>(slots * columns + offset);
  const Buffer<Weight> weights = random_values<Weight>(slots);
  const Buffer<int64_t> index(slots);
  for (int64_t i = 0; i < slots; ++i) index[i] = random_int(0, kExperts);
  if (slots > 3) index[1] = -1, index[slots - 1] = kExperts + 1;
  const Buffer<Y> y(tokens * columns);
  const CombineJob job{x.data() + offset, index.data(), weights.data(), kDType<Weight>, tokens,
                       columns,           top_k,        kExperts,       y.data(),       kDType<Y>};
  const int64_t blocks = combine_blocks(tokens, columns);
  shim::run_grid(combine_kernel<Y>, static_cast<unsigned>(blocks), unsigned{kCombineThreads}, size_t{0}, job,
                 static_cast<unsigned>(blocks / tokens),
                 can_move_groups(columns, job.x, static_cast<const Y*>(y.data())));
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t column = 0; column < columns; ++column) {
      float sum = 0;
      for (int64_t slot = token * top_k; slot < (token + 1) * top_k; ++slot) {
        if (index[slot] == kExperts) continue;
        const bool is_expert = 0 <= index[slot] && index[slot] < kExperts;
        sum = sum + (is_expert ? to_float(weights[slot]) * job.x[slot * columns + column] : NAN);
      }
      Y expected;
      from_float(sum, &expected);
      const float got = to_float(y[token * columns + column]);
      CHECK(same(got, to_float(expected)), "[%" PRId64 ", %" PRId64 "]: %g, not %g", token, column, got,
            to_float(expected));
    }
  }
}

void test_combines() {
  for (int64_t columns : {1, 7, 8, 250, 2048, 4104}) {
    for (int top_k : {0, 1, 2, 9}) {
      for (const bool is_aligned : {true, false}) {
        test_combine<float, float>(3, top_k, columns, is_aligned);
        test_combine<BFloat16, BFloat16>(2, top_k, columns, is_aligned);
        test_combine<Float16, float>(1, top_k, columns, is_aligned);
      }
    }
  }
}

ExpertsPlan plan(int64_t slots, int64_t experts, DType dtype, int arch = 90, int64_t k = 64, bool is_aligned = true) {
  TileProblem product{};
  product.n = 48;
  product.k = k;
  product.a = product.b = dtype;
  product.is_aligned = is_aligned;
  product.arch = product.code_arch = arch;
  return plan_experts({slots, experts, {product, product}});
}

void test_plan() {
  constexpr DType kInt8 = DType::kInt8, kFp8 = DType::kFloat8E4M3;
  const auto check = [](const ExpertsPlan& plan, bool is_mma, int tile_rows) {
    CHECK(plan.is_mma == is_mma && plan.tile_rows == tile_rows, "%d, %d rows", plan.is_mma, plan.tile_rows);
  };
  check(plan(0, 128, kInt8), false, 1);
  check(plan(8, 128, kInt8), false, 1);
  check(plan(64, 128, kInt8), false, 1);
  check(plan(65, 128, kInt8), false, 2);
  check(plan(256, 128, kFp8), false, 4);
  check(plan(512, 128, kInt8), false, 8);
  check(plan(513, 128, kInt8), true, 32);
  check(plan(8192, 128, kFp8), true, 32);
  check(plan(8193, 128, kInt8), true, 128);
  check(plan(8193, 128, kFp8), true, 64);
  check(plan(8193, 128, kInt8, 80), true, 128);
  check(plan(8193, 128, kFp8, 80), false, 8);
  check(plan(8193, 128, kInt8, 75), false, 8);
  check(plan(8193, 128, kInt8, 90, 40), false, 8);
  check(plan(8193, 128, kInt8, 90, 64, false), false, 8);
}

static_assert(route_threads(0) == 32 && route_threads(128) == 32 && route_threads(129) == 64);
static_assert(route_threads(1 << 20) == 32 * kRouteWarps);

}  // namespace

int main() {
  CHECK(tokens_together(0, 8) == 1 && tokens_together(5, 8) == 5, "few tokens");
  CHECK(tokens_together(1000, int64_t{1} << 30) == 63 && tokens_together(130, int64_t{1} << 40) == 44, "even parts");
  test_room_for_tiles();
  test_routes();
  test_combines();
  test_plan();
}
