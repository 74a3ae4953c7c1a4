// Which of our own tensor-core kernels multiplies: a pure function of shape, types and device. It knows the
// configurations that exist as kernels and no others, says why one cannot take a product, and takes of those that can the
// one with the smallest estimate of its time.
//
//   family   kernel      tile of y, k        takes
//   kWgmma   wgmma.cuh   128 x 128 x 128     9.0
//   kWgmma   the same    64 x 128 x 128      9.0, up to 64 rows: operands change places, k is split among blocks
//   kMma     mma.cuh     128 x 128 x 64      INT8 from 8.0 on, FP8 from 8.9 on
//
// The estimate: blocks run in waves, as many at a time as fit; a tile takes as long as its arithmetic or, if that is
// longer, its bytes from L2; and no product is faster than its bytes from memory. Rates are of data sheets and shares of
// them that others measured; none was measured with these kernels, so it chooses among those of one way to multiply only.
#pragma once

#include <algorithm>
#include <optional>
#include <string>

#include "cuda/kernels/tile_maps.h"

namespace sq {

enum class GemmFamily { kMma, kWgmma };  // ways to multiply, each proven and ranked as one
enum class GemmKernel { kMma, kWgmma, kSwapped };

struct GemmConfig {
  GemmFamily family;
  GemmKernel kernel;
  int tile_m, tile_n, tile_k;
};

// Of equal estimates the first is taken.
constexpr GemmConfig kGemmConfigs[] = {
    {GemmFamily::kWgmma, GemmKernel::kWgmma, WgmmaTile::kM, WgmmaTile::kN, WgmmaTile::kK},
    {GemmFamily::kWgmma, GemmKernel::kSwapped, SwapTile::kM, SwapTile::kN, SwapTile::kK},
    {GemmFamily::kMma, GemmKernel::kMma, MmaTile::kM, MmaTile::kN, MmaTile::kK},
};

constexpr int kMostSplits = 16;

struct TileProblem {
  int64_t m, n, k;
  DType a, b;
  int y_bytes;            // of a result
  bool is_aligned;        // a and b begin at multiples of 16 bytes
  int arch;               // of the GPU, 90 for 9.0
  int code_arch;          // of the code that it runs
  bool is_arch_specific;  // that code is for this architecture alone, such as 90a
  int multiprocessors;
};

// What a multiprocessor does in a microsecond, and the memory.
struct DeviceRates {
  int arch;
  double int8, fp8;     // operations of mma.sync, in millions; a multiply-add is two
  double wgmma;         // and of wgmma, either type
  double l2_bytes;      // of a multiprocessor, in thousands
  double memory_bytes;  // of the whole GPU, in thousands
};

// Dense rates by data sheet over multiprocessors: A100 (624 TOPS, 108), RTX 3090 (284, 82), L40S (733, 142), H100 SXM
// (1979, 132), B200 (4500, 148), RTX 5090 (838, 170). mma.sync reaches 0.63 of an H100's INT8 rate (Luo et al. 2024,
// "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture") and half of that in FP8, which it computes in fp16; on
// 10.0 it is taken to be as on 9.0. L2: 5120 bytes a clock of A100 by its white paper; of the others a guess
// from that.
constexpr DeviceRates kDeviceRates[] = {
    {80, 5.8, 0.0, 0.0, 67.0, 2000.0},  {86, 3.5, 0.0, 0.0, 40.0, 936.0},   {89, 5.2, 5.2, 0.0, 40.0, 864.0},
    {90, 9.4, 4.7, 15.0, 66.0, 3350.0}, {100, 9.4, 4.7, 0.0, 66.0, 8000.0}, {120, 4.9, 4.9, 0.0, 40.0, 1792.0},
};

// Of the newest GPU that is not newer.
constexpr DeviceRates device_rates(int arch) {
  DeviceRates found = kDeviceRates[0];
  for (const DeviceRates& rates : kDeviceRates) {
    if (rates.arch <= arch) found = rates;
  }
  return found;
}

inline std::string capability_text(int arch) { return std::to_string(arch / 10) + "." + std::to_string(arch % 10); }

// Why a configuration cannot take a product, or nothing.
inline std::string why_not(const GemmConfig& config, const TileProblem& problem) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 1;  // what TMA can address, blocks of a grid
  const bool is_fp8 = problem.a != DType::kInt8;
  if (config.family == GemmFamily::kWgmma && problem.arch != 90) {
    return "wgmma is an instruction of compute capability 9.0, and this GPU is of " + capability_text(problem.arch);
  }
  if (config.family == GemmFamily::kWgmma && !(problem.code_arch == 90 && problem.is_arch_specific)) {
    return "wgmma needs code for 90a, which this library was built without";
  }
  if (problem.arch < 80) return "mma needs compute capability 8.0, and this GPU is of " + capability_text(problem.arch);
  if (is_fp8 && problem.arch < 89) {
    return "compute capability " + capability_text(problem.arch) + " has no fp8 tensor cores";
  }
  if (is_fp8 && problem.code_arch < 89) {
    return "fp8 needs code for 89 or newer, and what this library has for this GPU is for " +
           std::to_string(problem.code_arch);
  }
  if (problem.k <= 0 || problem.k % kChunk != 0) {
    return "K is " + std::to_string(problem.k) + ", expected a positive multiple of 16";
  }
  if (config.kernel == GemmKernel::kSwapped && problem.m > config.tile_m) {
    return "swapped operands take up to " + std::to_string(config.tile_m) + " rows, and M is " +
           std::to_string(problem.m);
  }
  if (!problem.is_aligned) return "an operand does not begin at a multiple of 16 bytes";
  if (problem.m > kMost || problem.n > kMost || problem.k > kMost ||
      tiles_of(problem.m, config.tile_m) * tiles_of(problem.n, config.tile_n) > kMost) {
    return "M=" + std::to_string(problem.m) + ", N=" + std::to_string(problem.n) +
           " and K=" + std::to_string(problem.k) + " are too many";
  }
  return "";
}

// Blocks that may share a tile of y, each with tiles of k of its own.
inline int most_splits(const GemmConfig& config, const TileProblem& problem) {
  if (config.kernel != GemmKernel::kSwapped) return 1;
  return static_cast<int>(std::clamp<int64_t>(tiles_of(problem.k, config.tile_k), 1, kMostSplits));
}

// Microseconds.
inline double estimate(const GemmConfig& config, const TileProblem& problem, int splits) {
  constexpr double kLaunch = 3.0, kFill = 1.5;  // until the first tile's operands are there; untuned
  const DeviceRates rates = device_rates(problem.arch);
  const bool is_fp8 = problem.a != DType::kInt8, is_mma = config.kernel == GemmKernel::kMma;
  const double rate = !is_mma ? rates.wgmma : is_fp8 ? rates.fp8 : rates.int8;
  const double m = static_cast<double>(problem.m), n = static_cast<double>(problem.n);
  const auto depth = static_cast<double>(tiles_of(tiles_of(problem.k, config.tile_k), splits) * config.tile_k);
  const int64_t tiles = tiles_of(problem.m, config.tile_m) * tiles_of(problem.n, config.tile_n) * splits;
  const int together = is_mma ? MmaTile::blocks_together(is_fp8) : 1;  // on a multiprocessor
  const int64_t waves = tiles_of(tiles, std::max(1, problem.multiprocessors) * together);
  // Rows past the last are multiplied and not read.
  const double rows = std::min(m, static_cast<double>(config.tile_m));
  const double operations = 2.0 * config.tile_m * config.tile_n * depth;
  const double bytes = (rows + config.tile_n) * depth + rows * config.tile_n * problem.y_bytes;
  // Blocks that share a multiprocessor share its rates.
  const double tile = together * std::max(operations / (rate * 1e6), bytes / (rates.l2_bytes * 1e3));
  const double memory = (m + n) * static_cast<double>(problem.k) + m * n * problem.y_bytes;
  const double product = std::max(kFill + static_cast<double>(waves) * tile, memory / (rates.memory_bytes * 1e3));
  if (config.kernel != GemmKernel::kSwapped) return kLaunch + product;
  // Its sums are written and read once more, by another launch.
  const double sums = 8.0 * m * n * splits / (rates.l2_bytes * 1e3 * std::max(1, problem.multiprocessors));
  return kLaunch + product + kLaunch + sums;
}

struct GemmChoice {
  const GemmConfig* config;  // null: none can
  int splits;                // of k
  std::string reason;        // if none can, why not
};

// Of the configurations of a family, or of all of them.
inline GemmChoice choose_config(const TileProblem& problem, std::optional<GemmFamily> family) {
  GemmChoice choice{nullptr, 1, ""};
  std::string reasons;
  double least = 0.0;
  for (const GemmConfig& config : kGemmConfigs) {
    if (family.has_value() && config.family != *family) continue;
    const std::string reason = why_not(config, problem);
    if (!reason.empty()) {
      if (reasons.find(reason) == std::string::npos) reasons += (reasons.empty() ? "" : "; ") + reason;
      continue;
    }
    for (int splits = 1; splits <= most_splits(config, problem); ++splits) {
      const double time = estimate(config, problem, splits);
      if (choice.config != nullptr && time >= least) continue;
      choice.config = &config;
      choice.splits = splits;
      least = time;
    }
  }
  if (choice.config == nullptr) choice.reason = reasons;
  return choice;
}

}  // namespace sq
