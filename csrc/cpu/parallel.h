// How CPU work is cut into pieces for torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

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

// silu(gate) * up to 8 bits, a few rows at a time, so that the fp32 values between stay in cache.
inline void parallel_silu_mul_quantize(const Kernels& kernels, const SiluMulArgs& silu, const QuantizeArgs& quantize,
                                       int64_t rows) {
  if (rows == 0 || silu.k == 0) return parallel_quantize(kernels.quantize_rows, quantize, rows);
  constexpr int64_t kBlockElements = 16 * 1024;
  const int64_t block = std::max<int64_t>(1, kBlockElements / silu.k);
  // An exponential costs about as much as moving 32 bytes.
  parallel_rows(rows, silu.k * 32, [&](Range range) {
    Scratch values(std::min(block, range.end - range.begin) * silu.k * static_cast<int64_t>(sizeof(float)));
    SiluMulArgs source = silu;
    source.v = reinterpret_cast<float*>(values.data());
    QuantizeArgs target = quantize;
    target.x = values.data();
    target.x_dtype = DType::kFloat32;
    for (int64_t row = range.begin; row < range.end; row += block) {
      const int64_t last = std::min(range.end, row + block);
      kernels.silu_mul_rows(source, {row, last});
      target.q = quantize.q + row * quantize.q_stride;
      target.scale = quantize.scale + row;
      kernels.quantize_rows(target, {0, last - row});
    }
  });
}

inline void parallel_rms_norm(RmsNormRows rms_norm, const RmsNormArgs& args, int64_t rows) {
  if (args.k == 0) return;
  parallel_rows(rows, args.k * element_size(args.x_dtype), [&](Range range) { rms_norm(args, range); });
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

// Tasks are (block of rows, panel), panels fastest; a thread takes consecutive ones, so that few rows split panels, many
// rows split rows, and the pieces are even either way.
inline void parallel_gemm(GemmRange gemm, const GemmArgs& args, int64_t m, int64_t block_bytes) {
  const int64_t panels = panel_count(args.n);
  if (m == 0 || panels == 0) return;
  const int64_t blocks = row_blocks(m, args.a_stride, panels, block_bytes);
  // Multiples of 32 rows, the height of AMX's blocks.
  const int64_t rows = m <= 32 ? m : padded_rows(div_up(m, blocks));
  const int64_t tasks = div_up(m, rows) * panels;
  const int64_t grain = std::max<int64_t>(1, kGemmGrain / (rows * kPanel * std::max<int64_t>(1, args.k)));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end;) {
      const int64_t row = task / panels * rows;
      const int64_t first = task % panels;
      const int64_t last = std::min(panels, first + end - task);
      gemm(args, {row, std::min(m, row + rows)}, {first, last});
      task += last - first;
    }
  });
}

}  // namespace sq
