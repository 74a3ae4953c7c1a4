// Runs CUDA kernels on the CPU: include it before the .cuh, then run_grid(kernel, ...). What tensor cores need besides is
// in tensor_core_shim.h.
//
// The threads of a block are fibres in one operating system thread, switched only where they wait, and blocks run one
// after another; so __shared__ variables can be static. A shuffle is a barrier of its warp. A block in which nobody gets
// any further is a deadlock, and ends the program.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define SQ_DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(shim::dynamic_shared.get())

struct Dim {
  unsigned x = 1;
};

inline Dim threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

constexpr size_t kStackBytes = 64 * 1024;

struct Fibre {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool finished = false;
};

// Of some of a block's threads: each waits until all of them have come.
struct Barrier {
  unsigned arrived = 0, generation = 0;
};

inline std::vector<Fibre> fibres;
inline std::vector<uint32_t> shuffled;
inline Barrier block_barrier;
inline std::vector<Barrier> warp_barriers;
inline std::shared_ptr<void> dynamic_shared;
inline ucontext_t scheduler;
inline std::function<void()> body;
// Things that happen by themselves while threads wait, such as copies that were started. True: something happened.
inline std::function<bool()> meanwhile;
inline bool has_progress = false;
inline int64_t launches = 0;  // of run_grid, and of what stands for other libraries' kernels

inline void run_body() {
  body();
  fibres[threadIdx.x].finished = true;
  has_progress = true;
  // uc_link goes back to the scheduler.
}

// Gives the other threads their turn; the scheduler comes back once each has had it.
inline void yield() {
  const unsigned self = threadIdx.x;
  swapcontext(&fibres[self].context, &scheduler);
  threadIdx.x = self;
}

inline void wait(Barrier& barrier, unsigned threads) {
  const unsigned generation = barrier.generation;
  has_progress = true;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) yield();
}

inline void wait_for_warp() {
  const unsigned warp = threadIdx.x / 32;
  wait(warp_barriers[warp], std::min(32u, blockDim.x - warp * 32));
}

inline void start(Fibre& fibre) {
  fibre.finished = false;
  getcontext(&fibre.context);
  fibre.context.uc_stack = {fibre.stack.get(), 0, kStackBytes};
  fibre.context.uc_link = &scheduler;
  makecontext(&fibre.context, run_body, 0);
}

inline void run_block() {
  block_barrier = {};
  warp_barriers.assign((blockDim.x + 31) / 32, {});
  for (unsigned t = 0; t < blockDim.x; ++t) start(fibres[t]);
  for (bool running = true; running;) {
    running = has_progress = false;
    for (unsigned t = 0; t < blockDim.x; ++t) {
      if (fibres[t].finished) continue;
      threadIdx.x = t;
      swapcontext(&scheduler, &fibres[t].context);
      running = running || !fibres[t].finished;
    }
    if (meanwhile && meanwhile()) has_progress = true;
    if (running && !has_progress) {
      std::fprintf(stderr, "deadlock in block %u\n", blockIdx.x);
      std::abort();
    }
  }
}

// Exactly so many bytes, for a sanitizer to watch, and nothing in them that an earlier block left.
inline void allocate_shared(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 1024, bytes > 0 ? bytes : 1) != 0) std::abort();
  std::memset(memory, 0xff, bytes);
  dynamic_shared = std::shared_ptr<void>(memory, std::free);
}

template <typename Kernel, typename... Args>
void run_grid(Kernel kernel, unsigned blocks, unsigned threads, size_t shared_bytes, Args... args) {
  ++launches;
  gridDim.x = blocks;
  blockDim.x = threads;
  if (fibres.size() < threads) fibres = std::vector<Fibre>(threads);
  shuffled.assign(threads, 0);
  body = [=] { kernel(args...); };
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    allocate_shared(shared_bytes);
    run_block();
  }
}

}  // namespace shim

inline void __syncthreads() { shim::wait(shim::block_barrier, blockDim.x); }

template <typename T>
T __shfl_xor_sync(uint32_t /*mask*/, T value, int offset) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  std::memcpy(&shim::shuffled[threadIdx.x], &value, sizeof(T));
  shim::wait_for_warp();
  T other;
  std::memcpy(&other, &shim::shuffled[threadIdx.x ^ static_cast<unsigned>(offset)], sizeof(T));
  shim::wait_for_warp();
  return other;
}

inline int32_t __dp4a(int32_t a, int32_t b, int32_t sum) {
  for (int shift = 0; shift < 32; shift += 8) sum += static_cast<int8_t>(a >> shift) * static_cast<int8_t>(b >> shift);
  return sum;
}

inline float __fmaf_rn(float a, float b, float sum) { return std::fmaf(a, b, sum); }

inline uint32_t __ballot_sync(uint32_t /*mask*/, bool value) {
  const unsigned first = threadIdx.x / 32 * 32;
  shim::shuffled[threadIdx.x] = value ? 1 : 0;
  shim::wait_for_warp();
  uint32_t ballot = 0;
  for (unsigned lane = 0; lane < 32 && first + lane < blockDim.x; ++lane)
    ballot |= shim::shuffled[first + lane] << lane;
  shim::wait_for_warp();
  return ballot;
}

inline int __popc(uint32_t bits) { return __builtin_popcount(bits); }
