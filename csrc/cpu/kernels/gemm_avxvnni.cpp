// INT8 product with AVX-VNNI, vpdpbusd in registers of 256 bits: every instruction multiplies 32 bytes of the weight
// (8 columns, 4 k) by 4 broadcast bytes of a row. See gemm_ymm.h.
#include "cpu/kernels/gemm_ymm.h"

#if SQ_X86

namespace sq {
namespace {

struct AvxVnni {
  static constexpr int kColumns = 8, kBytes = 4;

  // The rows as they are.
  struct Rows {
    const uint8_t* data;
    int64_t stride;

    Rows(const uint8_t* a, int64_t a_stride, int64_t, int64_t) : data(a), stride(a_stride) {}
  };

  SQ_AVX2_INLINE static __m256i load(const uint8_t* b) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
  }
  SQ_AVX2_INLINE static __m256i broadcast(const uint8_t* a) {
    int32_t bytes;
    __builtin_memcpy(&bytes, a, sizeof bytes);
    return _mm256_set1_epi32(bytes);
  }
  // The intrinsic makes gcc 12 copy the accumulator before every use. {vex}: not the encoding of AVX512-VNNI.
  SQ_AVX2_INLINE static void multiply_add(__m256i& sum, __m256i a, __m256i b) {
    __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  }
  SQ_AVX2_INLINE static __m256i columns(const __m256i* sums, int i) { return sums[i]; }
};

void gemm_int8_avxvnni(const GemmArgs& args, Range rows, Range panels) { gemm_range<AvxVnni>(args, rows, panels); }

}  // namespace

constexpr GemmKernels kInt8AvxVnni = {"avxvnni", gemm_int8_avxvnni, /*block_bytes=*/1 << 19, nullptr,
                                      /*element_size=*/1};

}  // namespace sq

#endif
