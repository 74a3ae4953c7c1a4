#define SQ_ROWS(name) name##_portable
#define SQ_ROWS_TARGET
#include "rows_body.h"
