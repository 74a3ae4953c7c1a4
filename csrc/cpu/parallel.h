// How CPU work is cut into pieces for torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>

#include "kernels/kernels.h"
#include "scratch.h"

namespace sq {

// Below this many multiply-adds a thread, waking it takes longer than it saves.
constexpr int64_t kGemmGrain = 1 << 19;
constexpr int64_t kQuantizeGrain = 1 << 15;  // elements
constexpr int64_t kPackGrain = 1 << 16;      // bytes

inline void parallel_quantize(QuantizeRows quantize, const QuantizeArgs& args, int64_t rows) {
  if (rows == 0) return;
  const int64_t grain = std::max<int64_t>(1, kQuantizeGrain / std::max<int64_t>(1, args.k));
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { quantize(args, {begin, end}); });
}

// silu(gate) * up to 8 bits, a few rows at a time, so that the fp32 values between stay in cache.
inline void parallel_silu_mul_quantize(const Kernels& kernels, const SiluMulArgs& silu, const QuantizeArgs& quantize,
                                       int64_t rows) {
  if (rows == 0 || silu.k == 0) return parallel_quantize(kernels.quantize_rows, quantize, rows);
  constexpr int64_t kBlockElements = 16 * 1024;
  const int64_t block = std::max<int64_t>(1, kBlockElements / silu.k);
  const int64_t grain = std::max<int64_t>(1, kQuantizeGrain / 4 / silu.k);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    Scratch values(std::min(block, end - begin) * silu.k * static_cast<int64_t>(sizeof(float)));
    SiluMulArgs source = silu;
    source.v = reinterpret_cast<float*>(values.data());
    QuantizeArgs target = quantize;
    target.x = values.data();
    target.x_dtype = DType::kFloat32;
    for (int64_t row = begin; row < end; row += block) {
      const int64_t last = std::min(end, row + block);
      kernels.silu_mul_rows(source, {row, last});
      target.q = quantize.q + row * quantize.q_stride;
      target.scale = quantize.scale + row;
      kernels.quantize_rows(target, {0, last - row});
    }
  });
}

inline void parallel_rms_norm(RmsNormRows rms_norm, const RmsNormArgs& args, int64_t rows) {
  if (rows == 0 || args.k == 0) return;
  const int64_t grain = std::max<int64_t>(1, kQuantizeGrain / args.k);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) { rms_norm(args, {begin, end}); });
}

// Rows of a that are worth keeping in L2 while the panels go by.
inline int64_t rows_per_block(int64_t m, int64_t k) {
  constexpr int64_t kBlockBytes = 512 * 1024;
  const int64_t rows = std::max<int64_t>(64, kBlockBytes / std::max<int64_t>(64, k) / 32 * 32);
  return std::min(rows, m);
}

// Tasks are (block of rows, panel), panels fastest; a thread takes consecutive ones, so that few rows split panels, many
// rows split rows, and the pieces are even either way.
inline void parallel_gemm(GemmRange gemm, const GemmArgs& args, int64_t m) {
  const int64_t panels = panel_count(args.n);
  if (m == 0 || panels == 0) return;
  const int64_t block = rows_per_block(m, args.k);
  const int64_t blocks = div_up(m, block);
  const int64_t task_work = block * kPanel * std::max<int64_t>(1, args.k);
  const int64_t grain = std::max<int64_t>(1, kGemmGrain / task_work);
  torch::stable::parallel_for(0, blocks * panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end;) {
      const int64_t row = task / panels * block;
      const int64_t first = task % panels;
      const int64_t last = std::min(panels, first + end - task);
      gemm(args, {row, std::min(m, row + block)}, {first, last});
      task += last - first;
    }
  });
}

}  // namespace sq
