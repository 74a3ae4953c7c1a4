// The instructions of mma_instructions.cuh and wgmma_instructions.cuh in plain C++, after the documents of NVIDIA's PTX ISA
// and with nothing of the kernels but the maps of tile_maps.h, which tile_maps_test.cpp checks. Include it after
// cuda_shim.h and before the .cuh.
//
// What hardware does at some time of its own, this does at any: a copy or a product happens when it is started or when it is
// waited for, by chance, so that memory that is read or written too early gives wrong results in one of many runs.
#pragma once

#include <deque>
#include <type_traits>

#include "cuda_shim.h"
#include "kernels/round.cuh"
#include "kernels/tile_maps.h"

namespace shim {

using namespace sq;

inline void insist(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "block %u, thread %u: %s\n", blockIdx.x, threadIdx.x, what);
  std::abort();
}

inline uint32_t chance_state = 1;
// One of two.
inline bool by_chance() {
  chance_state = chance_state * 1664525 + 1013904223;
  return chance_state >> 31 != 0;
}

// Shared memory begins at an address that is aligned to 16 bytes and to no more.
constexpr uint32_t kSharedBase = 16;

inline uint8_t* shared(uint32_t address) {
  return static_cast<uint8_t*>(dynamic_shared.get()) + (address - kSharedBase);
}

template <DType kType>
auto decode(uint8_t code) {
  if constexpr (kType == DType::kInt8) return static_cast<int32_t>(static_cast<int8_t>(code));
  if constexpr (kType == DType::kFloat8E4M3) return float8_e4m3_to_float(code);
  if constexpr (kType == DType::kFloat8E5M2) return float8_e5m2_to_float(code);
}

// sum + the products of 32 values; fp8 rounds once.
template <DType kA, DType kB, typename Sum>
Sum dot(Sum sum, const uint8_t* a, const uint8_t* b) {
  std::conditional_t<std::is_same_v<Sum, float>, double, int32_t> total = sum;
  for (int k = 0; k < kMmaK; ++k) total += decode<kA>(a[k]) * decode<kB>(b[k]);
  return static_cast<Sum>(total);
}

// Work that a thread started, in groups; it happens at once or when it is waited for.
struct Pending {
  std::deque<std::vector<std::function<void()>>> groups{1};  // the last one is open

  void start(std::function<void()> work) {
    const bool is_first = groups.size() == 1 && groups[0].empty();
    if (is_first && by_chance()) return work();
    groups.back().push_back(std::move(work));
  }
  void commit() { groups.emplace_back(); }
  // Until `newest` committed groups are left.
  void wait(size_t newest) {
    for (; groups.size() - 1 > newest; groups.pop_front()) {
      for (const auto& work : groups.front()) work();
    }
  }
};

inline std::vector<Pending> copies;

struct WarpScratch {
  uint8_t a[16][kMmaK], b[8][kMmaK];
  uint32_t addresses[32];
};
inline std::vector<WarpScratch> warps;

template <typename Kernel, typename... Args>
void run_tensor_cores(Kernel kernel, unsigned blocks, unsigned threads, size_t shared_bytes, Args... args) {
  copies.assign(threads, {});
  warps.assign(threads / 32, {});
  run_grid(kernel, blocks, threads, shared_bytes, args...);
  for (const Pending& own : copies) {
    for (const auto& group : own.groups) insist(group.empty(), "a copy was never waited for");
  }
}

}  // namespace shim

namespace sq {

template <DType kA>
using SumOf = std::conditional_t<kA == DType::kInt8, int32_t, float>;

template <DType>
constexpr bool has_mma() {
  return true;
}
inline void trap() { std::abort(); }

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) -
                               static_cast<const uint8_t*>(shim::dynamic_shared.get())) +
         shim::kSharedBase;
}

// --- mma_instructions.cuh -------------------------------------------------------------------------------------------

inline void copy_async(uint32_t target, const void* source, bool is_there) {
  shim::insist(target % kChunk == 0 && reinterpret_cast<uintptr_t>(source) % kChunk == 0, "cp.async is not aligned");
  shim::copies[threadIdx.x].start([=] {
    is_there ? std::memcpy(shim::shared(target), source, kChunk) : std::memset(shim::shared(target), 0, kChunk);
  });
}
inline void commit_copies() { shim::copies[threadIdx.x].commit(); }
template <int kNewest>
void wait_for_copies() {
  shim::copies[threadIdx.x].wait(kNewest);
}

inline void load_matrices(uint32_t (&words)[4], uint32_t address) {
  shim::WarpScratch& warp = shim::warps[threadIdx.x / 32];
  const unsigned lane = threadIdx.x % 32;
  shim::insist(address % 16 == 0, "a row of ldmatrix is not aligned");
  warp.addresses[lane] = address;
  shim::wait_for_warp();
  for (unsigned r = 0; r < 4; ++r) {
    std::memcpy(&words[r], shim::shared(warp.addresses[r * 8 + lane / 4]) + lane % 4 * 4, 4);
  }
  shim::wait_for_warp();
}

template <DType kA, DType kB>
void multiply(SumOf<kA> (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  shim::WarpScratch& warp = shim::warps[threadIdx.x / 32];
  const int lane = static_cast<int>(threadIdx.x % 32);
  const uint32_t b[2] = {b0, b1};
  for (int byte = 0; byte < 4; ++byte) {
    for (int reg = 0; reg < 4; ++reg) {
      const MatrixPlace place = fragment_a(lane, reg, byte);
      warp.a[place.row][place.column] = static_cast<uint8_t>(a[reg] >> 8 * byte);
    }
    for (int reg = 0; reg < 2; ++reg) {
      const MatrixPlace place = fragment_b(lane, reg, byte);
      warp.b[place.column][place.row] = static_cast<uint8_t>(b[reg] >> 8 * byte);
    }
  }
  shim::wait_for_warp();
  for (int i = 0; i < 4; ++i) {
    const MatrixPlace place = fragment_c(lane, i);
    sums[i] = shim::dot<kA, kB>(sums[i], warp.a[place.row], warp.b[place.column]);
  }
  shim::wait_for_warp();
}

}  // namespace sq
