// What the AVX2 kernels share. Functions are compiled for their instruction set one by one, by attribute, as in avx512.h.
#pragma once

#if defined(__x86_64__)
#define SQ_X86 1
#include <immintrin.h>

#define SQ_AVX2 __attribute__((target("avx2,fma,f16c")))
#define SQ_AVX2_INLINE inline __attribute__((always_inline, target("avx2,fma,f16c")))
#else
#define SQ_X86 0
#endif
