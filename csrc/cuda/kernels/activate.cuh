// Activations that quantize: v = act(gate), or act(gate) * up, in fp32 (see cpu/kernels/activation.h), rotated where that
// is wanted, then q and scale of v as in quantize.cuh, with the bits of the CPU kernels.
//
// One block takes one row. v is computed once and waits in shared memory, a thread's own values only, until the largest
// magnitude of the row is known. Bytes moved: rows * columns * (2 * sizeof(T) + 1), without `up` one sizeof(T) less. Rows
// too long for shared memory are read and computed twice. A SiLU without fused multiply-adds, its division included, is
// about 60 instructions: by that count arithmetic, not memory, is the limit, at two thirds of an H100's bandwidth.
#pragma once

#include "common/activation.h"
#include "cuda/kernels/group.cuh"

namespace sq {

constexpr int kActivateBatch = 2;  // groups that a thread loads before it computes

// Threads that share a row evenly, at least two groups each where there are so many.
constexpr int activate_threads(int64_t columns) {
  const int64_t groups = (columns + kGroup - 1) / kGroup;
  const int64_t rounds = groups > 2 * kMaxThreads ? (groups + kMaxThreads - 1) / kMaxThreads : 2;
  const int64_t threads = ((groups + rounds - 1) / rounds + 31) / 32 * 32;
  return threads == 0 ? 32 : static_cast<int>(threads);
}

// Shared memory in bytes that v of a row takes.
constexpr int64_t activate_room(int64_t columns, int threads) {
  const int64_t step = static_cast<int64_t>(threads) * kGroup;
  return (columns + step - 1) / step * step * static_cast<int64_t>(sizeof(float));
}

template <typename T>
struct ActivateTask {
  const T *gate, *up;  // [rows, columns]; no up: null
  int64_t columns;
  int64_t row_step;  // from a row of gate or of up to the next
  bool wide;         // can_move_groups of all pointers
  bool is_kept;      // there is room for v in shared memory
  Rotation rotation;
  QuantizedRows target;
};

struct alignas(16) Quad {
  float at[4];
};

template <Activation kActivation, typename T>
SQ_HOST_DEVICE inline void activate_group(float (&values)[kGroup], const Group<T>& gate, const Group<T>& up,
                                          bool is_gated) {
  SQ_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    const float value = activate<kActivation>(to_float(gate.at[i]));
    values[i] = is_gated ? value * to_float(up.at[i]) : value;
  }
}

// Grid: a block per row of activate_threads(columns); shared memory of activate_room, if is_kept.
template <Activation kActivation, typename T, bool kRotates>
__global__ void __launch_bounds__(kMaxThreads) activate_rows_kernel(ActivateTask<T> job) {
  SQ_DYNAMIC_SHARED(Quad, room);  // [round][half of a group][thread], so that a warp's words lie side by side
  const int64_t row = blockIdx.x, columns = job.columns;
  const int64_t step = static_cast<int64_t>(blockDim.x) * kGroup;
  const int64_t begin = static_cast<int64_t>(threadIdx.x) * kGroup;
  const bool is_gated = job.up != nullptr;
  const T* gate_row = job.gate + row * job.row_step;
  const T* up_row = is_gated ? job.up + row * job.row_step : nullptr;
  const int64_t end = end_of_steps<kRotates>(columns);
  uint32_t magnitude = 0;
  float values[kGroup];

  for (int64_t first = begin, round = 0; first < end; first += kActivateBatch * step, round += kActivateBatch) {
    Group<T> gate[kActivateBatch] = {}, up[kActivateBatch] = {};
    SQ_UNROLL
    for (int g = 0; g < kActivateBatch; ++g) {
      gate[g] = load_raw(gate_row, first + g * step, columns, job.wide);
      if (is_gated) up[g] = load_raw(up_row, first + g * step, columns, job.wide);
    }
    SQ_UNROLL
    for (int g = 0; g < kActivateBatch; ++g) {
      if (first + g * step >= end) break;
      activate_group<kActivation>(values, gate[g], up[g], is_gated);
      if constexpr (kRotates) rotate_group(values, job.rotation);
      magnitude = max_magnitude(magnitude, values);
      if (!job.is_kept) continue;
      Quad* own = room + (round + g) * 2 * blockDim.x + threadIdx.x;
      own[0] = {{values[0], values[1], values[2], values[3]}};
      own[blockDim.x] = {{values[4], values[5], values[6], values[7]}};
    }
  }
  const RowScale result = row_scale(job.target, block_max(magnitude));
  if (threadIdx.x == 0) job.target.scale[row] = result.scale;
  for (int64_t first = begin, round = 0; first < end; first += step, ++round) {
    if (job.is_kept) {
      const Quad* own = room + round * 2 * blockDim.x + threadIdx.x;
      SQ_UNROLL
      for (int i = 0; i < kGroup; ++i) values[i] = own[i / 4 * blockDim.x].at[i % 4];
    } else {
      const Group<T> gate = load_raw(gate_row, first, columns, job.wide);
      const Group<T> up = is_gated ? load_raw(up_row, first, columns, job.wide) : Group<T>{};
      activate_group<kActivation>(values, gate, up, is_gated);
      if constexpr (kRotates) rotate_group(values, job.rotation);
    }
    store_quantized(job.target, row, columns, first, values, result.multiplier, job.wide);
  }
}

}  // namespace sq
