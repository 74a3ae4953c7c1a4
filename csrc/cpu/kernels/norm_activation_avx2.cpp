#if defined(__x86_64__)
#define SQ_ROWS_NAME "avx2"
#define SQ_ROWS_KERNELS kNormActivationAvx2
#define SQ_ROWS_TARGET __attribute__((target("avx2")))
#define SQ_ROWS_LANES 8
#include "cpu/kernels/norm_activation_body.h"
#endif
