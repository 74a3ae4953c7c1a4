// 8-bit product without tensor cores, y = cast((a @ b.T) * (a_scale * b_scale) + bias), for few rows of a [m, k]: it reads
// the weight b [n, k] once for every 8 rows. It takes any m, n and k, and so is also what computes the shapes that
// cuBLASLt refuses.
//
// A block computes kRows x kColumns of y. Its threads share out K, 16 bytes each at a time, so that all of them read each
// row of b in one stream; then sums are added within warps and between warps in a fixed order. K is split among threads
// and never among blocks: even 1024 columns make 256 blocks, whose loads together fill the memory's latency.
// Bytes moved: n * k of b from memory, kRows * k of a for every block from L1.
//
// INT8 sums are exact int32, so that bits are those of every other kernel. FP8 values are decoded to fp32, in which
// products are exact and sums are rounded at every step: a fused multiply-add has the bits of two instructions.
#pragma once

#include <type_traits>

#include "cuda/kernels/decode.cuh"
#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/row_map.cuh"

namespace sq {

constexpr int kSkinnyWarps = 8;   // of a block at most
constexpr int kSkinnyBytes = 16;  // of a row that a thread takes at a time

// Warps enough for a thread to have one turn of K, or more where 8 warps are not enough.
constexpr int skinny_threads(int64_t k) {
  const int64_t warps = (k + 32 * kSkinnyBytes - 1) / (32 * kSkinnyBytes);
  return 32 * static_cast<int>(warps < 1 ? 1 : warps < kSkinnyWarps ? warps : kSkinnyWarps);
}

struct alignas(16) Words {
  uint32_t at[4];
};

inline bool can_move_words(const uint8_t* a, const uint8_t* b, int64_t k) {
  return k % kSkinnyBytes == 0 && (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % 16 == 0;
}

// row[k, k + 16). kStream: read once, so that it need not push others out of L1.
template <bool kStream>
SQ_HOST_DEVICE inline Words load_words(const uint8_t* row, int64_t k) {
#ifdef __CUDA_ARCH__
  if constexpr (kStream) {
    Words words;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(words.at[0]), "=r"(words.at[1]), "=r"(words.at[2]), "=r"(words.at[3])
        : "l"(row + k));
    return words;
  }
#endif
  return *reinterpret_cast<const Words*>(row + k);
}

// row[k, k + 4), byte by byte, with zeros past its end.
SQ_HOST_DEVICE inline uint32_t load_word(const uint8_t* row, int64_t k, int64_t end) {
  uint32_t word = 0;
  SQ_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (k + i < end) word |= static_cast<uint32_t>(row[k + i]) << 8 * i;
  }
  return word;
}

// Adds kCount values over the lanes of a warp with few exchanges: each halves the values that a lane still cares for.
// Afterwards lane l has the totals number l * kHeld + i in values[i], where kHeld is kCount / 32; or, for fewer than 32
// values, number l / (32 / kCount) in values[0].
template <int kCount, typename Sum>
__device__ __forceinline__ void warp_sums(Sum (&values)[kCount]) {
  const unsigned lane = threadIdx.x % 32;
  int held = kCount;
  SQ_UNROLL
  for (int offset = 16; offset > 0; offset /= 2) {
    if (held == 1) {
      values[0] = values[0] + __shfl_xor_sync(0xffffffffu, values[0], offset);
      continue;
    }
    held /= 2;
    const bool upper = (lane & static_cast<unsigned>(offset)) != 0;
    SQ_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      if (i >= held) break;
      const Sum kept = upper ? values[i + held] : values[i];
      const Sum sent = upper ? values[i] : values[i + held];
      values[i] = kept + __shfl_xor_sync(0xffffffffu, sent, offset);
    }
  }
}

SQ_HOST_DEVICE inline void store_float(void* y, DType dtype, int64_t index, float value) {
  switch (dtype) {
    case DType::kBFloat16:
      return from_float(value, static_cast<BFloat16*>(y) + index);
    case DType::kFloat16:
      return from_float(value, static_cast<Float16*>(y) + index);
    default:
      return from_float(value, static_cast<float*>(y) + index);
  }
}

// The products of one word of each row with one of each column, 4 values of k.
template <int kRows, int kColumns>
__device__ __forceinline__ void add_products(int32_t (&sums)[kRows * kColumns], const uint32_t (&a)[kRows],
                                             const uint32_t (&b)[kColumns], DType, DType) {
  SQ_UNROLL
  for (int r = 0; r < kRows; ++r) {
    SQ_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      int32_t& sum = sums[r * kColumns + c];
      sum = __dp4a(static_cast<int32_t>(a[r]), static_cast<int32_t>(b[c]), sum);
    }
  }
}

template <int kRows, int kColumns>
__device__ __forceinline__ void add_products(float (&sums)[kRows * kColumns], const uint32_t (&a)[kRows],
                                             const uint32_t (&b)[kColumns], DType a_dtype, DType b_dtype) {
  float b_values[kColumns][4];
  SQ_UNROLL
  for (int c = 0; c < kColumns; ++c) decode_fp8(b[c], b_dtype, b_values[c]);
  SQ_UNROLL
  for (int r = 0; r < kRows; ++r) {
    float a_values[4];
    decode_fp8(a[r], a_dtype, a_values);
    SQ_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      SQ_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& sum = sums[r * kColumns + c];
        sum = __fmaf_rn(a_values[i], b_values[c][i], sum);
      }
    }
  }
}

// A thread's share of K. No branch stands between its loads, so that all of a turn are under way before the first is used.
template <int kRows, int kColumns, typename Sum>
__device__ __forceinline__ void add_wide(Sum (&sums)[kRows * kColumns], const uint8_t* const (&a_rows)[kRows],
                                         const uint8_t* const (&b_rows)[kColumns], const SkinnyJob& job) {
  const int64_t step = static_cast<int64_t>(blockDim.x) * kSkinnyBytes;
  for (int64_t at = static_cast<int64_t>(threadIdx.x) * kSkinnyBytes; at < job.k; at += step) {
    Words a[kRows], b[kColumns];
    SQ_UNROLL
    for (int c = 0; c < kColumns; ++c) b[c] = load_words<true>(b_rows[c], at);
    SQ_UNROLL
    for (int r = 0; r < kRows; ++r) a[r] = load_words<false>(a_rows[r], at);
    SQ_UNROLL
    for (int w = 0; w < 4; ++w) {
      uint32_t a_words[kRows], b_words[kColumns];
      SQ_UNROLL
      for (int r = 0; r < kRows; ++r) a_words[r] = a[r].at[w];
      SQ_UNROLL
      for (int c = 0; c < kColumns; ++c) b_words[c] = b[c].at[w];
      add_products<kRows, kColumns>(sums, a_words, b_words, job.a_dtype, job.b_dtype);
    }
  }
}

// The same of rows that do not begin at multiples of 16 bytes, which is rare.
template <int kRows, int kColumns, typename Sum>
__device__ __forceinline__ void add_narrow(Sum (&sums)[kRows * kColumns], const uint8_t* const (&a_rows)[kRows],
                                           const uint8_t* const (&b_rows)[kColumns], const SkinnyJob& job) {
  const int64_t step = static_cast<int64_t>(blockDim.x) * 4;
  for (int64_t at = static_cast<int64_t>(threadIdx.x) * 4; at < job.k; at += step) {
    uint32_t a_words[kRows], b_words[kColumns];
    SQ_UNROLL
    for (int c = 0; c < kColumns; ++c) b_words[c] = load_word(b_rows[c], at, job.k);
    SQ_UNROLL
    for (int r = 0; r < kRows; ++r) a_words[r] = load_word(a_rows[r], at, job.k);
    add_products<kRows, kColumns>(sums, a_words, b_words, job.a_dtype, job.b_dtype);
  }
}

// Blocks that a multiprocessor is to hold at least: what the registers of 8 rows of decoded fp8 leave room for, or two.
template <typename Sum>
constexpr int skinny_blocks_together(int rows) {
  return std::is_same_v<Sum, float> && rows == 8 ? 1 : 2;
}

// A tile of kRows x kColumns of y, by all threads of a block. Rows: see row_map.cuh.
template <typename Sum, int kRows, int kColumns, typename Rows>
__device__ __forceinline__ void skinny_tile(const SkinnyJob& job, const Rows& rows, int64_t first_row,
                                            int64_t first_column, bool wide) {
  constexpr int kCount = kRows * kColumns, kHeld = kCount > 32 ? kCount / 32 : 1;
  __shared__ Sum partial[kSkinnyWarps][kCount];
  const int64_t k = job.k;
  // Rows and columns past the last repeat it, and are not stored.
  const uint8_t *a_rows[kRows], *b_rows[kColumns];
  SQ_UNROLL
  for (int r = 0; r < kRows; ++r) {
    a_rows[r] = job.a + rows.input(first_row + r < job.epilogue.m ? first_row + r : job.epilogue.m - 1) * k;
  }
  SQ_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    b_rows[c] = job.b + (first_column + c < job.epilogue.n ? first_column + c : job.epilogue.n - 1) * k;
  }

  Sum sums[kCount] = {};
  wide ? add_wide<kRows, kColumns>(sums, a_rows, b_rows, job) : add_narrow<kRows, kColumns>(sums, a_rows, b_rows, job);

  warp_sums(sums);
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  SQ_UNROLL
  for (int i = 0; i < kHeld; ++i) partial[warp][kCount >= 32 ? lane * kHeld + i : lane / (32 / kCount)] = sums[i];
  __syncthreads();
  for (unsigned i = threadIdx.x; i < kCount; i += blockDim.x) {
    const int64_t row = first_row + i / kColumns, column = first_column + i % kColumns;
    if (row >= job.epilogue.m || column >= job.epilogue.n) continue;
    Sum sum = partial[0][i];
    for (unsigned other = 1; other < blockDim.x / 32; ++other) sum = sum + partial[other][i];
    store_finished(job.epilogue, rows.output(row) * job.epilogue.n + column,
                   epilogue_value(job.epilogue, rows.input(row), column, sum));
  }
}

// Grid: column_blocks for each kRows rows; threads: skinny_threads(k); wide: can_move_words.
template <typename Sum, int kRows, int kColumns>
__global__ void __launch_bounds__(32 * kSkinnyWarps, skinny_blocks_together<Sum>(kRows))
    skinny_gemm_kernel(SkinnyJob job, unsigned column_blocks, bool wide) {
  skinny_tile<Sum, kRows, kColumns>(job, AllRows{}, static_cast<int64_t>(blockIdx.x / column_blocks) * kRows,
                                    static_cast<int64_t>(blockIdx.x % column_blocks) * kColumns, wide);
}

}  // namespace sq
