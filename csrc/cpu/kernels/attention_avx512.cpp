// Attention with AVX-512, sixteen floats at a time.
#include "avx512.h"

#if SQ_X86
#define SQ_ATTENTION_TARGET SQ_AVX512
#include "attention_avx512.h"

namespace sq {

SQ_ATTENTION_TARGET void attend_avx512(const AttentionArgs& args, const AttentionTask& task) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return attend<Avx512, Avx512, BFloat16>(args, task);
    case DType::kFloat16:
      return attend<Avx512, Avx512, Float16>(args, task);
    default:
      return attend<Avx512, Avx512, float>(args, task);
  }
}

}  // namespace sq

#endif
