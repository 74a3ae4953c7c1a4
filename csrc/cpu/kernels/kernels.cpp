#include "kernels.h"

namespace sq {

const Kernels& kernels_of(Isa isa) {
  static constexpr Kernels kTable[] = {
      /* portable   */ {quantize_rows_portable, gemm_int8_portable, gemm_fp8_portable},
      /* avx512vnni */ {quantize_rows_portable, gemm_int8_portable, gemm_fp8_portable},
      /* amx        */ {quantize_rows_portable, gemm_int8_portable, gemm_fp8_portable},
  };
  return kTable[static_cast<int>(isa)];
}

}  // namespace sq
