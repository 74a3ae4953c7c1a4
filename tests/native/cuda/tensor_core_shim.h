// The instructions of mma_instructions.cuh and wgmma_instructions.cuh in plain C++, after the documents of NVIDIA's PTX ISA
// and with nothing of the kernels but the maps of tile_maps.h, which tile_maps_test.cpp checks. Include it after
// cuda_shim.h and before the .cuh.
//
// What hardware does at some time of its own, this does at any: a copy or a product happens when it is started or when it is
// waited for, by chance, so that memory that is read or written too early gives wrong results in one of many runs.
#pragma once

#include <deque>
#include <type_traits>

#include "cuda/kernels/round.cuh"
#include "cuda/kernels/tensor_map.h"
#include "cuda/kernels/tile_maps.h"
#include "native/cuda/cuda_shim.h"

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

inline std::vector<Pending> copies, products;

struct WarpScratch {
  uint8_t a[16][kMmaK], b[8][kMmaK];
  uint32_t addresses[32];
};
inline std::vector<WarpScratch> warps;

// --- mbarrier and TMA

// An mbarrier's 8 bytes.
struct Mbarrier {
  uint16_t arrivals, pending;  // of a phase; still to come in this one
  int32_t bytes : 31;          // still to come
  uint32_t phase : 1;
};
static_assert(sizeof(Mbarrier) == 8);

inline Mbarrier& mbarrier(uint32_t address) {
  insist(address % 8 == 0, "an mbarrier is not aligned");
  return *reinterpret_cast<Mbarrier*>(shared(address));
}

inline void complete(Mbarrier& barrier) {
  has_progress = true;
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.pending = barrier.arrivals;
  barrier.phase ^= 1;
}

// What the driver puts into a CUtensorMap is its own affair; this is ours.
struct MapOfRows {
  const uint8_t* data;
  int64_t rows, k;
  int box_rows, box_k;
};

inline TensorMap map_of_rows(const MapOfRows& rows) {
  static_assert(sizeof rows <= sizeof(TensorMap));
  TensorMap map{};
  std::memcpy(&map, &rows, sizeof rows);
  return map;
}

struct BoxCopy {
  uint32_t target;
  MapOfRows from;
  int k, row;
  uint32_t barrier;
};
inline std::vector<BoxCopy> boxes;

inline void deliver(const BoxCopy& copy) {
  const MapOfRows& from = copy.from;
  for (int r = 0; r < from.box_rows; ++r) {
    for (int byte = 0; byte < from.box_k; ++byte) {
      const int64_t row = int64_t{copy.row} + r, k = int64_t{copy.k} + byte;
      const bool is_inside = row < from.rows && k < from.k;
      const uint32_t address = copy.target + static_cast<uint32_t>(r * from.box_k + byte);
      *shared(swizzle_128(address)) = is_inside ? from.data[row * from.k + k] : 0;
    }
  }
  Mbarrier& barrier = mbarrier(copy.barrier);
  barrier.bytes -= from.box_rows * from.box_k;
  complete(barrier);
}

// Some of the copies under way arrive, in any order.
inline bool deliver_boxes() {
  const bool has_boxes = !boxes.empty();
  for (size_t i = boxes.size(); i-- > 0;) {
    if (by_chance()) continue;
    const BoxCopy copy = boxes[i];
    boxes.erase(boxes.begin() + static_cast<std::ptrdiff_t>(i));
    deliver(copy);
  }
  return has_boxes;
}

// --- wgmma

// Row `row` of what a descriptor describes, its 32 bytes of k.
inline void read_row(uint64_t descriptor, int row, uint8_t (&bytes)[kMmaK]) {
  insist(descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0, "a descriptor of another layout");
  const auto start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const auto stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  const uint32_t address = start + static_cast<uint32_t>(row) / 8 * stride + static_cast<uint32_t>(row) % 8 * 128;
  for (uint32_t chunk = 0; chunk < kMmaK; chunk += 16) {
    std::memcpy(bytes + chunk, shared(swizzle_128(address + chunk)), 16);
  }
}

template <typename Kernel, typename... Args>
void run_tensor_cores(Kernel kernel, unsigned blocks, unsigned threads, size_t shared_bytes, Args... args) {
  copies.assign(threads, {});
  products.assign(threads, {});
  boxes.clear();
  meanwhile = deliver_boxes;
  warps.assign(threads / 32, {});
  run_grid(kernel, blocks, threads, shared_bytes, args...);
  meanwhile = nullptr;
  insist(boxes.empty(), "a box was never waited for");
  for (const auto* started : {&copies, &products}) {
    for (const Pending& own : *started) {
      for (const auto& group : own.groups) insist(group.empty(), "a copy or a product was never waited for");
    }
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

// --- wgmma_instructions.cuh -----------------------------------------------------------------------------------------

constexpr bool has_wgmma() { return true; }

inline void init_barrier(uint32_t barrier, uint32_t arrivals) {
  const auto count = static_cast<uint16_t>(arrivals);
  shim::mbarrier(barrier) = {count, count, 0, 0};
}
inline void fence_barriers() {}

inline void arrive(uint32_t address) {
  shim::Mbarrier& barrier = shim::mbarrier(address);
  shim::insist(barrier.pending > 0, "more arrivals than a phase has");
  --barrier.pending;
  shim::complete(barrier);
}
inline void arrive_expecting(uint32_t address, uint32_t bytes) {
  shim::mbarrier(address).bytes += static_cast<int32_t>(bytes);
  arrive(address);
}
inline void wait_for_barrier(uint32_t address, uint32_t parity) {
  while (shim::mbarrier(address).phase == parity) shim::yield();
}

inline void prefetch_map(const TensorMap&) {}
inline void copy_box(uint32_t target, const TensorMap& map, int k, int row, uint32_t barrier) {
  shim::MapOfRows from;
  std::memcpy(&from, &map, sizeof from);
  shim::insist(target % 128 == 0 && from.box_k == 128, "a swizzled box is not aligned");
  shim::boxes.push_back({target, from, k, row, barrier});
}

inline void fence_products() {}
inline void commit_products() { shim::products[threadIdx.x].commit(); }
template <int kNewest>
void wait_for_products() {
  shim::products[threadIdx.x].wait(kNewest);
}
template <typename Sum, int kN>
void hold(Sum (&)[kN][4]) {}

template <DType kRows, DType kColumns, int kN>
void multiply_async(SumOf<kRows> (&sums)[kN][4], uint64_t rows, uint64_t columns, bool adds) {
  auto* own = &sums;
  const int thread = static_cast<int>(threadIdx.x);
  shim::products[threadIdx.x].start([=] {
    uint8_t left[2][kMmaK], right[2][kMmaK];
    for (int half = 0; half < 2; ++half) shim::read_row(rows, fragment_d(thread, 2 * half).row, left[half]);
    for (int i = 0; i < 4 * kN; ++i) {
      if (i % 4 < 2) shim::read_row(columns, fragment_d(thread, i).column, right[i % 2]);
      auto& sum = (*own)[i / 4][i % 4];
      sum = shim::dot<kRows, kColumns>(adds ? sum : SumOf<kRows>{}, left[i / 2 % 2], right[i % 2]);
    }
  });
}

}  // namespace sq
