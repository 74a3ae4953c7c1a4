// Runs CUDA kernels that use no tensor cores on the CPU: include it before the .cuh, then run_grid(kernel, ...).
//
// The threads of a block are fibres in one operating system thread, switched only at barriers, and blocks run one after
// another; so all threads of a block must reach the same barriers, and __shared__ variables can be static. A shuffle is
// a barrier of the whole block.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

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

template <typename Kernel, typename... Args>
void run_grid(Kernel kernel, unsigned blocks, unsigned threads, Args... args) {
  gridDim.x = blocks;
  blockDim.x = threads;
  if (fibres.size() < threads) fibres = std::vector<Fibre>(threads);
  shuffled.assign(threads, 0);
  body = [=] { kernel(args...); };
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) run_block();
}

}  // namespace shim

inline void __syncthreads() { shim::barrier(); }

inline uint32_t __shfl_xor_sync(uint32_t /*mask*/, uint32_t value, int offset) {
  shim::shuffled[threadIdx.x] = value;
  shim::barrier();
  const uint32_t other = shim::shuffled[threadIdx.x ^ static_cast<unsigned>(offset)];
  shim::barrier();
  return other;
}
