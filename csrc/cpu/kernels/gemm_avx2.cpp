// INT8 product with AVX2, which has no instruction for bytes that cannot overflow: both operands are widened to 16 bits,
// and vpmaddwd multiplies 4 columns x 4 k of the weight by 4 broadcast values of a row, into two sums a column that are
// added at the end of a chunk. The weight is widened as it is loaded, for up to 6 rows at a time. See gemm_ymm.h.
#include "cpu/kernels/gemm_ymm.h"

#if SQ_X86

namespace sq {
namespace {

struct Avx2 {
  static constexpr int kColumns = 4, kBytes = 8;

  // The rows of a tile in 16 bits.
  struct Rows {
    static constexpr int64_t stride = kDepth4 * kBytes + kLine;
    alignas(32) uint8_t data[kRows * stride];

    SQ_AVX2 Rows(const uint8_t* a, int64_t a_stride, int64_t count, int64_t depth4) {
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t k = 0; k < 4 * depth4; k += 16) {  // padded_k(K) values are there to read
          const auto* bytes = reinterpret_cast<const __m128i*>(a + r * a_stride + k);
          auto* target = reinterpret_cast<__m256i*>(data + r * stride + 2 * k);
          _mm256_store_si256(target, _mm256_cvtepu8_epi16(_mm_loadu_si128(bytes)));
        }
      }
    }
  };

  SQ_AVX2_INLINE static __m256i load(const uint8_t* b) {
    return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b)));
  }
  SQ_AVX2_INLINE static __m256i broadcast(const uint8_t* a) {
    int64_t values;
    __builtin_memcpy(&values, a, sizeof values);
    return _mm256_set1_epi64x(values);
  }
  // With intrinsics gcc 12 computes all the products first, for which there are no registers.
  SQ_AVX2_INLINE static void multiply_add(__m256i& sum, __m256i a, __m256i b) {
    __m256i products;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(a), "x"(b));
  }
  SQ_AVX2_INLINE static __m256i columns(const __m256i* sums, int i) {
    // Pairs within 128-bit lanes: columns 0 1 4 5 | 2 3 6 7.
    return _mm256_permute4x64_epi64(_mm256_hadd_epi32(sums[2 * i], sums[2 * i + 1]), _MM_SHUFFLE(3, 1, 2, 0));
  }
};

void gemm_int8_avx2(const GemmArgs& args, Range rows, Range panels) { gemm_range<Avx2>(args, rows, panels); }

}  // namespace

constexpr GemmKernels kInt8Avx2 = {"avx2", gemm_int8_avx2, /*block_bytes=*/1 << 19, nullptr, /*element_size=*/1};

}  // namespace sq

#endif
