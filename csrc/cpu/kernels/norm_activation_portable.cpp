#define SQ_ROWS_NAME "portable"
#define SQ_ROWS_KERNELS kNormActivationPortable
#define SQ_ROWS_TARGET
#define SQ_ROWS_LANES 4
#include "cpu/kernels/norm_activation_body.h"
