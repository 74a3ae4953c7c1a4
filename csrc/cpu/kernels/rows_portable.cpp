#define SQ_ROWS(name) name##_portable
#define SQ_ROWS_TARGET
#define SQ_ROWS_LANES 4
#include "rows_body.h"
