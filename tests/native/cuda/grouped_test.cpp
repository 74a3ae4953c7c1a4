// The products of a mixture's experts, run on the CPU, without tensor cores and on emulated ones: rows of every slot against
// exact sums, INT8 bit for bit, FP8 within the rounding of fp32 sums.
#include "native/cuda/tensor_core_shim.h"

// After the shim.
#include <algorithm>
#include <vector>

#include "cuda/kernels/grouped_mma.cuh"
#include "cuda/kernels/grouped_skinny.cuh"
#include "cuda/kernels/route.cuh"
#include "native/cuda/tile_gemm_cases.h"

namespace {

using namespace sq;

struct GroupedCase {
  int64_t slots;
  int experts;
  int64_t n, k;
  DType dtype;
  int tile_rows, layers, slots_per_row;
  bool is_mma;
  int64_t offset;  // bytes before weights, which take their alignment away
};

template <typename Sum, int kRows>
void run_skinny(const GroupedJob& job, bool wide) {
  shim::run_grid(grouped_skinny_kernel<Sum, kRows, kSkinnyColumns>,
                 static_cast<unsigned>(grouped_blocks(job.tile_count, job.n, job.layer_count, kSkinnyColumns)),
                 static_cast<unsigned>(skinny_threads(job.k)), size_t{0}, job,
                 static_cast<uint32_t>(tiles_of(job.n, kSkinnyColumns)), wide);
}

template <typename Sum>
void run_skinny(const GroupedJob& job, int tile_rows, bool wide) {
  if (tile_rows == 1) return run_skinny<Sum, 1>(job, wide);
  if (tile_rows == 2) return run_skinny<Sum, 2>(job, wide);
  tile_rows == 4 ? run_skinny<Sum, 4>(job, wide) : run_skinny<Sum, 8>(job, wide);
}

template <DType kType, int kRows>
void run_mma(const GroupedJob& job) {
  using Tile = MmaShape<kRows>;
  shim::run_tensor_cores(grouped_mma_kernel<kType, Tile>,
                         static_cast<unsigned>(grouped_blocks(job.tile_count, job.n, job.layer_count, Tile::kN)),
                         unsigned{Tile::kThreads}, size_t{Tile::kSharedBytes}, job,
                         static_cast<uint32_t>(tiles_of(job.n, Tile::kN)));
}

void run(const GroupedCase& test, const GroupedJob& job) {
  if (!test.is_mma) {
    return test.dtype == DType::kInt8 ? run_skinny<int32_t>(job, test.tile_rows, test.offset == 0 && job.k % 16 == 0)
                                      : run_skinny<float>(job, test.tile_rows, test.offset == 0 && job.k % 16 == 0);
  }
  with_8bit_type(test.dtype, [&](auto type) {
    constexpr DType kType = decltype(type)::value;
    test.tile_rows == kFewMmaRows ? run_mma<kType, kFewMmaRows>(job)
                                  : run_mma<kType, many_mma_rows(kType != DType::kInt8)>(job);
  });
}

struct Layer {
  Buffer<uint8_t> b, y;
  Buffer<float> scale, bias;
  bool is_per_channel, has_bias;
};

void test_grouped(const GroupedCase& test) {
  const int64_t rows = (test.slots + test.slots_per_row - 1) / test.slots_per_row, n = test.n, k = test.k;
  const DType y_dtype = test.layers == 2 && test.dtype == DType::kInt8 ? DType::kBFloat16 : DType::kFloat32;
  const Buffer<int64_t> index(test.slots);
  for (int64_t i = 0; i < test.slots; ++i) index[i] = random_int(0, test.experts);
  const int64_t tile_count = first_row_tile(test.slots, test.experts, test.tile_rows);
  const Buffer<int32_t> order(test.slots);
  const Buffer<RowTile> tiles(tile_count);
  shim::run_grid(
      route_kernel, static_cast<unsigned>(test.experts), static_cast<unsigned>(route_threads(test.slots)), size_t{0},
      RouteJob{index.data(), test.slots, test.experts, test.tile_rows, order.data(), tiles.data(), tile_count});

  const Buffer<uint8_t> a = random_codes(rows * k, test.dtype);
  const Buffer<float> a_scale = random_scales(rows);
  GroupedJob job{a.data(), a_scale.data(), test.dtype,   test.slots_per_row, n,           k,
                 y_dtype,  order.data(),   tiles.data(), tile_count,         test.layers, {}};
  std::vector<Layer> layers;
  for (int i = 0; i < test.layers; ++i) {
    const bool is_per_channel = (i + test.tile_rows + test.layers) % 2 == 0;
    layers.push_back({random_codes(test.experts * n * k + test.offset, test.dtype),
                      Buffer<uint8_t>(test.slots * n * element_size(y_dtype)),
                      random_scales(test.experts * (is_per_channel ? n : 1)), random_values<float>(test.experts * n),
                      is_per_channel, i == 0});
    const Layer& own = layers.back();
    std::fill_n(own.y.data(), own.y.size(), uint8_t{0xa5});
    job.layers[i] = {own.b.data() + test.offset,
                     own.scale.data(),
                     is_per_channel ? 1 : 0,
                     own.has_bias ? own.bias.data() : nullptr,
                     DType::kFloat32,
                     own.y.data()};
  }
  run(test, job);

  const Buffer<float> untouched(1);
  std::fill_n(reinterpret_cast<uint8_t*>(untouched.data()), 4, uint8_t{0xa5});
  for (const Layer& own : layers) {
    for (int64_t slot = 0; slot < test.slots; ++slot) {
      const int64_t expert = index[slot], row = slot / test.slots_per_row;
      for (int64_t column = 0; column < n; ++column) {
        const float got = load_float(own.y.data(), y_dtype, slot * n + column);
        if (expert == test.experts) {
          CHECK(same(got, load_float(untouched.data(), y_dtype, 0)), "slot %" PRId64 " has no expert", slot);
          continue;
        }
        const uint8_t* b = own.b.data() + test.offset + (expert * n + column) * k;
        double sum = 0, magnitude = 0;
        for (int64_t i = 0; i < k; ++i) {
          const double product = double{decode(a[row * k + i], test.dtype)} * decode(b[i], test.dtype);
          sum += product;
          magnitude += std::fabs(product);
        }
        const float b_scale = own.scale[own.is_per_channel ? expert * n + column : expert];
        const float bias = own.has_bias ? own.bias[expert * n + column] : 0.0f;
        if (test.dtype == DType::kInt8) {
          const float scaled = static_cast<float>(sum) * (a_scale[row] * b_scale);
          const float expected = cast_value(own.has_bias ? scaled + bias : scaled, y_dtype);
          CHECK(same(got, expected), "slot %" PRId64 ", column %" PRId64 ": %g, not %g", slot, column, got, expected);
          continue;
        }
        const double scale = static_cast<double>(a_scale[row]) * b_scale, exact = sum * scale + bias;
        const TileCase like{1, n, k, test.dtype, test.dtype, DType::kFloat32, y_dtype, own.has_bias, true, true};
        const double bound = fp8_bound(like, exact, magnitude * scale + std::fabs(bias));
        CHECK(std::fabs(got - exact) <= bound, "slot %" PRId64 ", column %" PRId64 ": %g, not %g", slot, column, got,
              exact);
      }
    }
  }
}

}  // namespace

int main() {
  constexpr DType kTypes[] = {DType::kInt8, DType::kFloat8E4M3, DType::kFloat8E5M2};
  for (const DType dtype : kTypes) {
    int turn = 0;
    for (const int tile_rows : {1, 2, 4, 8}) {
      for (const int64_t k : {0, 1, 48, 600}) {
        for (const int experts : {1, 3, 300}) {
          ++turn;
          test_grouped({turn % 2 == 0 ? 25 : 6, experts, k > 100 || experts > 100 ? 3 : 9, k, dtype, tile_rows,
                        1 + turn % 2, 1 + turn % 3, false, turn % 5 == 0 ? 1 : 0});
        }
      }
    }
    const int many = many_mma_rows(dtype != DType::kInt8);
    test_grouped({80, 2, 130, 144, dtype, kFewMmaRows, 2, 3, true, 0});
    test_grouped({40, 30, 33, 16, dtype, kFewMmaRows, 1, 1, true, 0});
    test_grouped({300, 1, 136, 80, dtype, many, 1, 2, true, 0});
    test_grouped({20, 5, 16, 272, dtype, many, 2, 8, true, 0});
  }
}
