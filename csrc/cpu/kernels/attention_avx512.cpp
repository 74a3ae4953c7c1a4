// Attention with AVX-512, sixteen floats at a time.
#include "cpu/kernels/avx512.h"

#if SQ_X86
#define SQ_ATTENTION_TARGET SQ_AVX512
#include "cpu/kernels/attention_avx512.h"

namespace sq {

namespace {

SQ_ATTENTION_TARGET void attend_avx512(const AttentionArgs& args, const AttentionTask& task) {
  attend_in_dtype<Avx512, Avx512>(args, task);
}

}  // namespace

constexpr AttentionKernels kAttentionAvx512 = {"avx512", attend_avx512};

}  // namespace sq

#endif
