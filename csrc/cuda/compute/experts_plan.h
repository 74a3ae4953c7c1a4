// How the experts of a mixture are computed on a GPU: a pure function of what the host knows, so that it can be tested
// without one. How many rows each expert has is known on the device only; the host knows their mean.
//
//   kernel   rows of a tile                        where
//   skinny   1, 2, 4, 8: at least twice the mean   up to 4 rows an expert, and all that mma.sync does not take
//   mma      32                                    up to 64 rows an expert
//   mma      128, of fp8 64                        above
//
// The bounds are untuned.
#pragma once

#include <algorithm>
#include <vector>

#include "cuda/kernels/experts.h"
#include "cuda/kernels/gemm_config.h"

namespace sq {

// Bytes between the first product and the last that are kept at a time: tokens beyond come after. Untuned; tests make it
// small.
#ifndef SQ_MOST_EXPERT_BYTES
#define SQ_MOST_EXPERT_BYTES (int64_t{1} << 30)
#endif

struct ExpertsProblem {
  int64_t slots;  // of the tokens done together
  int64_t experts;
  std::vector<TileProblem> products;  // of one expert each, m aside
};

struct ExpertsPlan {
  bool is_mma;
  int tile_rows;
};

inline ExpertsPlan plan_experts(const ExpertsProblem& problem) {
  constexpr int64_t kMostSkinny = 4, kMostFew = 64;  // rows an expert
  const int64_t slots = problem.slots, experts = problem.experts;
  bool can_mma = slots > kMostSkinny * experts, is_fp8 = false;
  for (TileProblem product : problem.products) {
    product.m = slots;
    can_mma = can_mma && choose_config(product, GemmFamily::kMma).config != nullptr;
    is_fp8 = is_fp8 || product.a != DType::kInt8;
  }
  if (can_mma) return {true, slots <= kMostFew * experts ? kFewMmaRows : many_mma_rows(is_fp8)};
  int rows = 1;
  while (rows < kSkinnyRows && rows * experts < 2 * slots) rows *= 2;
  return {false, rows};
}

// Tokens done together, in even parts: weights are read once for each part.
inline int64_t tokens_together(int64_t tokens, int64_t token_bytes) {
  constexpr int64_t kFewest = 64;
  const int64_t most = std::max(kFewest, SQ_MOST_EXPERT_BYTES / std::max<int64_t>(1, token_bytes));
  const int64_t parts = (tokens + most - 1) / most;
  return parts == 0 ? 1 : (tokens + parts - 1) / parts;
}

}  // namespace sq
