#define SQ_ROWS(name) name##_portable
#define SQ_ROWS_TARGET
#define SQ_ROWS_LANES 4
#include "cpu/kernels/norm_activation_body.h"
