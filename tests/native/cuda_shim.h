// Runs CUDA kernels that use no tensor cores on the CPU: include it before the .cuh, then run_grid(kernel, ...).
//
// The threads of a block are fibres in one operating system thread, switched only at barriers, and blocks run one after
// another; so all threads of a block must reach the same barriers, and __shared__ variables can be static. A shuffle is
// a barrier of the whole block.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
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

inline std::vector<Fibre> fibres;
inline std::vector<uint32_t> shuffled;
inline std::shared_ptr<void> dynamic_shared;
inline ucontext_t scheduler;
inline std::function<void()> body;

inline void run_body() {
  body();
  fibres[threadIdx.x].finished = true;
  // uc_link goes back to the scheduler.
}

// Gives the other threads their turn; the scheduler comes back once each has had it.
inline void barrier() {
  const unsigned self = threadIdx.x;
  swapcontext(&fibres[self].context, &scheduler);
  threadIdx.x = self;
}

inline void start(Fibre& fibre) {
  fibre.finished = false;
  getcontext(&fibre.context);
  fibre.context.uc_stack = {fibre.stack.get(), 0, kStackBytes};
  fibre.context.uc_link = &scheduler;
  makecontext(&fibre.context, run_body, 0);
}

inline void run_block() {
  for (unsigned t = 0; t < blockDim.x; ++t) start(fibres[t]);
  for (bool running = true; running;) {
    running = false;
    for (unsigned t = 0; t < blockDim.x; ++t) {
      if (fibres[t].finished) continue;
      threadIdx.x = t;
      swapcontext(&scheduler, &fibres[t].context);
      running = running || !fibres[t].finished;
    }
  }
}

// Exactly so many bytes, for a sanitizer to watch, and nothing in them that an earlier block left.
inline void allocate_shared(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, bytes > 0 ? bytes : 1) != 0) std::abort();
  std::memset(memory, 0xff, bytes);
  dynamic_shared = std::shared_ptr<void>(memory, std::free);
}

template <typename Kernel, typename... Args>
void run_grid(Kernel kernel, unsigned blocks, unsigned threads, size_t shared_bytes, Args... args) {
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

inline void __syncthreads() { shim::barrier(); }

template <typename T>
T __shfl_xor_sync(uint32_t /*mask*/, T value, int offset) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  std::memcpy(&shim::shuffled[threadIdx.x], &value, sizeof(T));
  shim::barrier();
  T other;
  std::memcpy(&other, &shim::shuffled[threadIdx.x ^ static_cast<unsigned>(offset)], sizeof(T));
  shim::barrier();
  return other;
}

inline int32_t __dp4a(int32_t a, int32_t b, int32_t sum) {
  for (int shift = 0; shift < 32; shift += 8) sum += static_cast<int8_t>(a >> shift) * static_cast<int8_t>(b >> shift);
  return sum;
}
