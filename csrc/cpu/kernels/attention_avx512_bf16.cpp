// Attention in bf16 with vdpbf16ps, which multiplies pairs and adds them to fp32.
#include "cpu/kernels/avx512.h"

#if SQ_X86
#define SQ_ATTENTION_TARGET __attribute__((target(SQ_AVX512_FEATURES ",avx512bf16")))
#include "cpu/kernels/attention_avx512_bf16.h"

namespace sq {

namespace {

SQ_ATTENTION_TARGET void attend_avx512_bf16(const AttentionArgs& args, const AttentionTask& task) {
  if (args.dtype == DType::kBFloat16) {
    attend<Avx512, Avx512Bf16, BFloat16>(args, task);
  } else {
    kAttentionAvx512.run(args, task);
  }
}

}  // namespace

constexpr AttentionKernels kAttentionAvx512Bf16 = {"avx512bf16", attend_avx512_bf16};

}  // namespace sq

#endif
