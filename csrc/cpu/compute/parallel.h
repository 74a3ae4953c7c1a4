// How CPU work is cut into pieces for torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/kernels/dispatch.h"
#include "cpu/kernels/scratch.h"

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
      target.scale = args.scale == nullptr ? nullptr : args.scale + row;
      quantize(target, {0, last - row});
    }
  });
}

// rotate: the size of blocks that a Hadamard matrix rotates before they are quantized, or 0.
inline void parallel_quantize(const Kernels& kernels, const QuantizeArgs& args, int64_t rotate, int64_t rows) {
  const int64_t row_bytes = args.k * element_size(args.x_dtype);
  if (rotate == 0) {
    parallel_rows(rows, row_bytes, [&](Range range) { kernels.quantize.run(args, range); });
    return;
  }
  QuantizeArgs target = args;
  target.smooth = nullptr;
  parallel_produce_quantize(kernels.quantize.run, target, rows, row_bytes, [&](Range range, float* values) {
    kernels.norm_activation.hadamard({args.k, rotate, args.x, args.x_dtype, args.smooth, values}, range);
  });
}

inline void parallel_activate_quantize(const Kernels& kernels, const ActivateArgs& source, const QuantizeArgs& target,
                                       int64_t rotate, int64_t rows) {
  // An exponential costs about as much as moving 32 bytes.
  parallel_produce_quantize(kernels.quantize.run, target, rows, source.k * 32, [&](Range range, float* values) {
    ActivateArgs args = source;
    args.v = values;
    kernels.norm_activation.activate(args, range);
    if (rotate == 0) return;
    kernels.norm_activation.hadamard({args.k, rotate, values, DType::kFloat32, nullptr, values},
                                     {0, range.end - range.begin});
  });
}

// How many rows of a to multiply at a time: few enough for a block to stay in L2, and with many threads so few that every
// thread gets one of the blocks * panels tasks. Multiples of 32 rows, the height of AMX's blocks.
inline int64_t block_rows(int64_t m, int64_t a_stride, int64_t panels, int64_t block_bytes) {
  constexpr int64_t kMostRows = 512, kFewestRows = 64;
  const int64_t most = std::clamp(block_bytes / std::max<int64_t>(1, a_stride), kFewestRows, kMostRows);
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t fewest = div_up(m, most);
  int64_t best = m;
  double best_idle = 0.0;
  for (int64_t blocks = fewest; blocks < fewest + 4 && (blocks == fewest || m / blocks >= kFewestRows); ++blocks) {
    const int64_t rows = m <= 32 ? m : padded_rows(div_up(m, blocks));
    // What the thread with the most work does: its share, rounded up to whole tasks.
    const double share = static_cast<double>(m * panels) / static_cast<double>(threads);
    const double idle = static_cast<double>(div_up(m * panels, threads * rows) * rows) / share;
    if (blocks == fewest || idle < best_idle - 0.04) {
      best = rows;
      best_idle = idle;
    }
  }
  return best;
}

// Several products of the same m rows of a, in one parallel region. Tasks are (block of rows, panel), panels of all
// products one after the other and fastest; a thread takes consecutive ones, so that few rows split panels and many rows
// split rows. What is shared out is rows of a panel, not tasks, because the last block may be lower: a thread takes the
// tasks that begin in its share.
inline void parallel_gemm(GemmRange gemm, const std::vector<GemmArgs>& products, int64_t m, int64_t block_bytes) {
  int64_t panels = 0;
  for (const GemmArgs& args : products) panels += panel_count(args.n);
  if (m == 0 || panels == 0) return;
  const int64_t k = products.front().k;
  const int64_t most_rows = block_rows(m, products.front().a_stride, panels, block_bytes);
  const int64_t grain = std::max(most_rows, kGemmGrain / (kPanel * std::max<int64_t>(1, k)));
  torch::stable::parallel_for(0, m * panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin / (most_rows * panels) * most_rows; row < m && row * panels < end; row += most_rows) {
      const int64_t rows = std::min(most_rows, m - row);
      const auto task_from = [&](int64_t place) {
        return std::clamp<int64_t>(div_up(std::max<int64_t>(0, place - row * panels), rows), 0, panels);
      };
      const int64_t first = task_from(begin), last = task_from(end);
      int64_t base = 0;
      for (const GemmArgs& args : products) {
        const int64_t count = panel_count(args.n);
        const Range own{std::max<int64_t>(0, first - base), std::min(count, last - base)};
        if (own.begin < own.end) gemm(args, {row, row + rows}, own);
        base += count;
      }
    }
  });
}

// A product of these rows of the activation alone.
struct RowsProduct {
  GemmArgs args;
  Range rows;
};

// Products with rows of their own, in one parallel region. Panels cost what their rows cost and what reading them does, and
// every thread gets as much as the others, so that one expert's many rows and ten experts' single ones both split well.
inline void parallel_gemm(GemmRange gemm, const std::vector<RowsProduct>& products, int64_t block_bytes) {
  constexpr int64_t kReadRows = 16;  // that could be multiplied while a panel is read from memory
  struct Block {
    const GemmArgs* args;
    Range rows;
    int64_t start, cost, panels;  // the cost of all before, and of each panel
  };
  std::vector<Block> blocks;
  int64_t total = 0, k = 1;
  for (const RowsProduct& product : products) {
    const int64_t count = product.rows.end - product.rows.begin, panels = panel_count(product.args.n);
    if (count == 0 || panels == 0) continue;
    k = std::max<int64_t>(1, product.args.k);
    const int64_t rows = block_rows(count, product.args.a_stride, panels, block_bytes);
    for (int64_t row = product.rows.begin; row < product.rows.end; row += rows) {
      const int64_t last = std::min(product.rows.end, row + rows);
      blocks.push_back({&product.args, {row, last}, total, last - row + kReadRows, panels});
      total += blocks.back().cost * panels;
    }
  }
  const int64_t grain = (1 + kReadRows) * std::max<int64_t>(1, kGemmGrain / (kPanel * k));
  if (total == 0) return;
  torch::stable::parallel_for(0, total, grain, [&](int64_t begin, int64_t end) {
    const auto after = std::upper_bound(blocks.begin(), blocks.end(), begin,
                                        [](int64_t at, const Block& block) { return at < block.start; });
    for (auto block = after - 1; block != blocks.end() && block->start < end; ++block) {
      // A panel is that thread's in whose range it begins.
      const int64_t first = std::max<int64_t>(0, div_up(begin - block->start, block->cost));
      const int64_t last = std::min(block->panels, div_up(end - block->start, block->cost));
      if (first < last) gemm(*block->args, block->rows, {first, last});
    }
  });
}

}  // namespace sq
