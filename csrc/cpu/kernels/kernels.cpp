#include "kernels.h"

namespace sq {

const Kernels& kernels_of(Isa isa) {
  static constexpr Kernels kPortable = {
      "portable", quantize_rows_portable, "portable", gemm_int8_portable, "portable", gemm_fp8_portable,
      "portable", rms_norm_rows_portable, silu_mul_rows_portable,
  };
#if defined(__x86_64__)
  static constexpr Kernels kAvx512Vnni = {
      "avx512", quantize_rows_avx512, "avx512vnni", gemm_int8_avx512vnni, "portable", gemm_fp8_portable,
      "avx512", rms_norm_rows_avx512, silu_mul_rows_avx512,
  };
  static constexpr Kernels kAmx = {
      "avx512", quantize_rows_avx512, "amx", gemm_int8_amx, "portable", gemm_fp8_portable,
      "avx512", rms_norm_rows_avx512, silu_mul_rows_avx512,
  };
  switch (isa) {
    case Isa::kAmx:
      return kAmx;
    case Isa::kAvx512Vnni:
      return kAvx512Vnni;
    case Isa::kPortable:
      break;
  }
#else
  static_cast<void>(isa);
#endif
  return kPortable;
}

}  // namespace sq
