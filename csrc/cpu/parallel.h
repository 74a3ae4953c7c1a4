// How CPU work is cut into pieces for torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "scratch.h"

namespace sq {

// With less work than this a thread, waking it takes longer than it saves.
constexpr int64_t kGemmGrain = 1 << 19;  // multiply-adds
constexpr int64_t kRowsGrain = 1 << 16;  // bytes

// Calls work(range) on pieces of [0, rows), each row of which touches about row_bytes bytes.
template <class Work>
void parallel_rows(int64_t rows, int64_t row_bytes, const Work& work) {
  if (rows == 0) return;
  const int64_t grain = div_up(kRowsGrain, std::max<int64_t>(1, row_bytes));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { work(Range{begin, end}); });
}

inline void parallel_quantize(QuantizeRows quantize, const QuantizeArgs& args, int64_t rows) {
  parallel_rows(rows, args.k * element_size(args.x_dtype), [&](Range range) { quantize(args, range); });
}

// Quantizes fp32 values that produce(rows, v) computes a few rows at a time, so that they stay in cache. row_bytes is
// what computing a row costs, in bytes that could be moved meanwhile.
template <class Produce>
void parallel_produce_quantize(QuantizeRows quantize, const QuantizeArgs& args, int64_t rows, int64_t row_bytes,
                               const Produce& produce) {
  constexpr int64_t kBlockElements = 16 * 1024;
  const int64_t block = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, args.k));
  parallel_rows(rows, row_bytes, [&](Range range) {
    Scratch values(std::min(block, range.end - range.begin) * args.k * static_cast<int64_t>(sizeof(float)));
    QuantizeArgs target = args;
    target.x = values.data();
    target.x_dtype = DType::kFloat32;
    for (int64_t row = range.begin; row < range.end; row += block) {
      const int64_t last = std::min(range.end, row + block);
      produce(Range{row, last}, reinterpret_cast<float*>(values.data()));
      target.q = args.q + row * args.q_stride;
      target.scale = args.scale + row;
      quantize(target, {0, last - row});
    }
  });
}

inline void parallel_activate_quantize(const Kernels& kernels, const ActivateArgs& source, const QuantizeArgs& target,
                                       int64_t rows) {
  // An exponential costs about as much as moving 32 bytes.
  parallel_produce_quantize(kernels.quantize_rows, target, rows, source.k * 32, [&](Range range, float* values) {
    ActivateArgs args = source;
    args.v = values;
    kernels.activate_rows(args, range);
  });
}

// Into how many blocks to cut m rows, so that a block of a stays in L2 and, where that is not far off, every thread gets as
// many of the blocks * panels tasks as the others.
inline int64_t row_blocks(int64_t m, int64_t a_stride, int64_t panels, int64_t block_bytes) {
  constexpr int64_t kMostRows = 512, kFewestRows = 64;
  const int64_t rows = std::clamp(block_bytes / std::max<int64_t>(1, a_stride), kFewestRows, kMostRows);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t fewest = div_up(m, rows);
  int64_t best = fewest;
  double best_idle = 2.0;
  for (int64_t blocks = fewest; blocks < fewest + 4 && (blocks == fewest || m / blocks >= kFewestRows); ++blocks) {
    const int64_t tasks = blocks * panels;
    const double idle = static_cast<double>(div_up(tasks, threads) * threads) / static_cast<double>(tasks);
    if (idle < best_idle - 0.04) {
      best = blocks;
      best_idle = idle;
    }
  }
  return best;
}

// Several products of the same m rows of a, in one parallel region. Tasks are (block of rows, panel), panels of all
// products one after the other and fastest; a thread takes consecutive ones, so that few rows split panels, many rows
// split rows, and the pieces are even either way.
inline void parallel_gemm(GemmRange gemm, const std::vector<GemmArgs>& products, int64_t m, int64_t block_bytes) {
  int64_t panels = 0;
  for (const GemmArgs& args : products) panels += panel_count(args.n);
  if (m == 0 || panels == 0) return;
  const int64_t k = products.front().k;
  const int64_t blocks = row_blocks(m, products.front().a_stride, panels, block_bytes);
  // Multiples of 32 rows, the height of AMX's blocks.
  const int64_t rows = m <= 32 ? m : padded_rows(div_up(m, blocks));
  const int64_t tasks = div_up(m, rows) * panels;
  const int64_t grain = std::max<int64_t>(1, kGemmGrain / (rows * kPanel * std::max<int64_t>(1, k)));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end;) {
      const int64_t row = task / panels * rows;
      const int64_t first = task % panels, last = std::min(panels, first + end - task);
      int64_t base = 0;
      for (const GemmArgs& args : products) {
        const int64_t count = panel_count(args.n);
        const Range own{std::max<int64_t>(0, first - base), std::min(count, last - base)};
        if (own.begin < own.end) gemm(args, {row, std::min(m, row + rows)}, own);
        base += count;
      }
      task += last - first;
    }
  });
}

}  // namespace sq
