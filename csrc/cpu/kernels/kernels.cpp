#include "kernels.h"

namespace sq {

const Kernels& kernels_of(Isa isa) {
  static constexpr Kernels kTable[] = {
      /* portable   */ {"portable", quantize_rows_portable, "portable", gemm_int8_portable, "portable", gemm_fp8_portable},
      /* avx512vnni */ {"portable", quantize_rows_portable, "portable", gemm_int8_portable, "portable", gemm_fp8_portable},
      /* amx        */ {"portable", quantize_rows_portable, "portable", gemm_int8_portable, "portable", gemm_fp8_portable},
  };
  return kTable[static_cast<int>(isa)];
}

}  // namespace sq
