// The instructions of mma.cuh, from compute capability 8.0 on. For the tests, tests/native/tensor_core_shim.h has the same
// in plain C++, which is why nothing else of them is used.
#pragma once

#include <type_traits>

#include "cuda/kernels/round.cuh"

namespace sq {

#ifdef __CUDACC__

// What products of an 8-bit type are added in.
template <DType kA>
using SumOf = std::conditional_t<kA == DType::kInt8, int32_t, float>;

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts copying 16 bytes from global to shared memory, or writing 16 zeros.
__device__ __forceinline__ void copy_async(uint32_t target, const void* source, bool is_there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(target), "l"(source), "r"(is_there ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Until this thread's copies are done, but for the newest groups of them.
template <int kNewest>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kNewest) : "memory");
}

__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

#define SQ_MMA_FP8(a_type, b_type)                                           \
  asm("mma.sync.aligned.m16n8k32.row.col.f32." a_type "." b_type             \
      ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// sums [16, 8] += a [16, 32] @ b [32, 8], in the fragments of tile_maps.h.
template <DType kA, DType kB>
__device__ __forceinline__ void multiply(SumOf<kA> (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kA == DType::kInt8) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
        "%3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    if constexpr (kA == DType::kFloat8E4M3 && kB == DType::kFloat8E4M3) SQ_MMA_FP8("e4m3", "e4m3");
    if constexpr (kA == DType::kFloat8E4M3 && kB == DType::kFloat8E5M2) SQ_MMA_FP8("e4m3", "e5m2");
    if constexpr (kA == DType::kFloat8E5M2 && kB == DType::kFloat8E4M3) SQ_MMA_FP8("e5m2", "e4m3");
    if constexpr (kA == DType::kFloat8E5M2 && kB == DType::kFloat8E5M2) SQ_MMA_FP8("e5m2", "e5m2");
#endif
  }
}

#undef SQ_MMA_FP8

// Whether the code that is being compiled has the instruction; gemm_config.h sees to it that no other runs.
template <DType kA>
__device__ constexpr bool has_mma() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  return kA == DType::kInt8;
#else
  return true;
#endif
}

__device__ __forceinline__ void trap() { asm volatile("trap;"); }

#endif

}  // namespace sq
