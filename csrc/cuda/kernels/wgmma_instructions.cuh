// The instructions of wgmma.cuh, of compute capability 9.0 alone (sm_90a). For the tests, tests/native/tensor_core_shim.h
// has the same in plain C++.
#pragma once

#include "cuda/kernels/mma_instructions.cuh"
#include "cuda/kernels/tensor_map.h"

namespace sq {

#ifdef __CUDACC__

// Whether the code that is being compiled has them; gemm_config.h sees to it that no other runs.
__device__ constexpr bool has_wgmma() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  return true;
#else
  return false;
#endif
}

// --- mbarrier: of 8 bytes in shared memory. A phase is complete once all have arrived and all bytes that were announced
// are there.

__device__ __forceinline__ void init_barrier(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(barrier), "r"(arrivals) : "memory");
}

// After the barriers are made, before a __syncthreads: then the copy engine sees them too.
__device__ __forceinline__ void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
  asm volatile("fence.proxy.async.shared::cta;" : : : "memory");
}

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(barrier) : "memory");
}

// Arrives, and announces bytes that TMA will bring.
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" : : "r"(barrier), "r"(bytes) : "memory");
}

// Until the phase of this parity is complete.
__device__ __forceinline__ void wait_for_barrier(uint32_t barrier, uint32_t parity) {
  uint32_t is_complete = 0;
  while (is_complete == 0) {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.u32 %0, 1, 0, complete;\n"
        "}\n"
        : "=r"(is_complete)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// --- TMA

__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" : : "l"(&map) : "memory");
}

// Starts copying the box of the map that begins at byte k of row `row`, with zeros outside the matrix; its bytes arrive at
// the barrier.
__device__ __forceinline__ void copy_box(uint32_t target, const TensorMap& map, int k, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      :
      : "r"(target), "l"(&map), "r"(k), "r"(row), "r"(barrier)
      : "memory");
}

// --- wgmma

// Before the first product of a group, and between other uses of its sums and a product.
__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" : : : "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" : : : "memory"); }

// Until all but the newest groups are done.
template <int kNewest>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kNewest) : "memory");
}

// Keeps the compiler from moving other uses of the sums over this point: it does not know that products are under way.
template <typename Sum, int kN>
__device__ __forceinline__ void hold(Sum (&sums)[kN][4]) {
  SQ_UNROLL
  for (int i = 0; i < kN * 4; ++i) {
    if constexpr (std::is_same_v<Sum, float>) {
      asm volatile("" : "+f"(sums[i / 4][i % 4]) : : "memory");
    } else {
      asm volatile("" : "+r"(sums[i / 4][i % 4]) : : "memory");
    }
  }
}

#define SQ_FOUR(letter, i) \
  "+" letter(sums[i][0]), "+" letter(sums[i][1]), "+" letter(sums[i][2]), "+" letter(sums[i][3])
#define SQ_SIXTEEN(letter, i) SQ_FOUR(letter, i), SQ_FOUR(letter, i + 1), SQ_FOUR(letter, i + 2), SQ_FOUR(letter, i + 3)
#define SQ_WGMMA_64(types, letter, signs)                                                                      \
  asm volatile(                                                                                                \
      "{\n"                                                                                                    \
      ".reg .pred adds;\n"                                                                                     \
      "setp.ne.b32 adds, %34, 0;\n"                                                                            \
      "wgmma.mma_async.sync.aligned.m64n64k32." types                                                          \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, %32, %33, adds" signs                                \
      ";\n"                                                                                                    \
      "}\n"                                                                                                    \
      : SQ_SIXTEEN(letter, 0), SQ_SIXTEEN(letter, 4)                                                           \
      : "l"(rows), "l"(columns), "r"(adds ? 1 : 0))
#define SQ_WGMMA_128(types, letter, signs)                                                                     \
  asm volatile(                                                                                                \
      "{\n"                                                                                                    \
      ".reg .pred adds;\n"                                                                                     \
      "setp.ne.b32 adds, %66, 0;\n"                                                                            \
      "wgmma.mma_async.sync.aligned.m64n128k32." types                                                         \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, " \
      "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "   \
      "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "   \
      "%62, %63}, %64, %65, adds" signs                                                                        \
      ";\n"                                                                                                    \
      "}\n"                                                                                                    \
      : SQ_SIXTEEN(letter, 0), SQ_SIXTEEN(letter, 4), SQ_SIXTEEN(letter, 8), SQ_SIXTEEN(letter, 12)            \
      : "l"(rows), "l"(columns), "r"(adds ? 1 : 0))
#define SQ_WGMMA(types, letter, signs)  \
  if constexpr (kN == 16) {             \
    SQ_WGMMA_128(types, letter, signs); \
  } else {                              \
    SQ_WGMMA_64(types, letter, signs);  \
  }

// Starts sums [64, 8 * kN] = rows [64, 32] @ columns [8 * kN, 32].T, or +=, of a warpgroup; both are descriptors.
template <DType kRows, DType kColumns, int kN>
__device__ __forceinline__ void multiply_async(SumOf<kRows> (&sums)[kN][4], uint64_t rows, uint64_t columns,
                                               bool adds) {
  static_assert(kN == 8 || kN == 16);
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  if constexpr (kRows == DType::kInt8) {
    SQ_WGMMA("s32.s8.s8", "r", "")
  } else if constexpr (kRows == DType::kFloat8E4M3 && kColumns == DType::kFloat8E4M3) {
    SQ_WGMMA("f32.e4m3.e4m3", "f", ", 1, 1")
  } else if constexpr (kRows == DType::kFloat8E4M3) {
    SQ_WGMMA("f32.e4m3.e5m2", "f", ", 1, 1")
  } else if constexpr (kColumns == DType::kFloat8E4M3) {
    SQ_WGMMA("f32.e5m2.e4m3", "f", ", 1, 1")
  } else {
    SQ_WGMMA("f32.e5m2.e5m2", "f", ", 1, 1")
  }
#endif
}

#undef SQ_WGMMA_64
#undef SQ_WGMMA_128
#undef SQ_WGMMA
#undef SQ_SIXTEEN
#undef SQ_FOUR

#endif

}  // namespace sq
