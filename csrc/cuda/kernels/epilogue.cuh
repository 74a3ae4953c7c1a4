// What follows a matrix product whose sums are in memory: scales, bias and cast of int32 or fp32 sums, see Finish. And what
// precedes one in bf16: fp8 values widened, exactly.
//
// Epilogue: a thread takes 4 neighbouring columns of a row, 16 bytes of sums; bytes moved: m * n * (4 * splits + sizeof(Y)).
// A product whose k was split has several sums, which are added here in their order.
// Widening: a thread takes 8 values; bytes moved: 3 a value.
#pragma once

#include "cuda/kernels/finish.cuh"
#include "cuda/kernels/group.cuh"

namespace sq {

constexpr int kEpilogueThreads = 256;
constexpr int kEpilogueColumns = 4;  // of a thread

template <typename T>
struct alignas(sizeof(T) * kEpilogueColumns) Four {
  T at[kEpilogueColumns];
};

// Blocks that share a row.
constexpr int64_t epilogue_blocks(int64_t n) {
  constexpr int64_t kColumns = kEpilogueThreads * kEpilogueColumns;
  return (n + kColumns - 1) / kColumns;
}

// Grid: epilogue_blocks(n) for each row. wide: rows of sums and of y can be moved in fours.
template <typename Sum, typename Y>
__global__ void __launch_bounds__(kEpilogueThreads)
    epilogue_kernel(const Sum* sums, int splits, Finish finish, unsigned row_blocks, bool wide) {
  const int64_t row = blockIdx.x / row_blocks;
  const int64_t first =
      (static_cast<int64_t>(blockIdx.x % row_blocks) * kEpilogueThreads + threadIdx.x) * kEpilogueColumns;
  if (first >= finish.n) return;
  const Sum* source = sums + row * finish.n + first;
  const int64_t count = finish.m * finish.n;  // of a split
  Y* target = static_cast<Y*>(finish.y) + row * finish.n + first;
  if (wide) {
    Four<Sum> four = *reinterpret_cast<const Four<Sum>*>(source);
    for (int split = 1; split < splits; ++split) {
      const Four<Sum> more = *reinterpret_cast<const Four<Sum>*>(source + split * count);
      SQ_UNROLL
      for (int i = 0; i < kEpilogueColumns; ++i) four.at[i] += more.at[i];
    }
    Four<Y> result;
    SQ_UNROLL
    for (int i = 0; i < kEpilogueColumns; ++i) {
      from_float(finish_value(finish, row, first + i, four.at[i]), &result.at[i]);
    }
    *reinterpret_cast<Four<Y>*>(target) = result;
    return;
  }
  for (int i = 0; i < kEpilogueColumns && first + i < finish.n; ++i) {
    Sum sum = source[i];
    for (int split = 1; split < splits; ++split) sum += source[split * count + i];
    from_float(finish_value(finish, row, first + i, sum), target + i);
  }
}

// Any grid and block. wide: q and wide are aligned to groups.
__global__ void __launch_bounds__(kMaxThreads)
    widen_kernel(const uint8_t* q, DType dtype, BFloat16* wide, int64_t count, bool is_aligned) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x * kGroup;
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kGroup; first < count;
       first += step) {
    const bool whole = is_aligned && first + kGroup <= count;
    const Group<uint8_t> bytes = load_raw(q, first, count, whole);
    Group<BFloat16> result;
    SQ_UNROLL
    for (int w = 0; w < kGroup / 4; ++w) {
      uint32_t word = 0;
      SQ_UNROLL
      for (int i = 0; i < 4; ++i) word |= static_cast<uint32_t>(bytes.at[4 * w + i]) << 8 * i;
      float values[4];
      decode_fp8(word, dtype, values);
      SQ_UNROLL
      for (int i = 0; i < 4; ++i) from_float(values[i], &result.at[4 * w + i]);
    }
    store_group(wide, result, first, count, whole);
  }
}

}  // namespace sq
