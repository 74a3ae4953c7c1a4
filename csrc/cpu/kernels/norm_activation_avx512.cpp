#if defined(__x86_64__)
#define SQ_ROWS_NAME "avx512"
#define SQ_ROWS_KERNELS kNormActivationAvx512
#define SQ_ROWS_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#define SQ_ROWS_LANES 16
#include "cpu/kernels/norm_activation_body.h"
#endif
