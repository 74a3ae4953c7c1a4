#include "cpu/kernels/dispatch.h"

namespace sq {

// clang-format off
const Kernels& kernels_of(Isa isa) {
  static constexpr Kernels kPortable = {
      "portable", quantize_rows_portable,
      "portable", gemm_int8_portable, /*block_bytes=*/1 << 17,
      "portable", /*fp8_element_size=*/4, widen_fp32_portable, gemm_fp8_portable, /*fp8_block_bytes=*/1 << 17,
      "portable", norm_rows_portable, activate_rows_portable, rotate_rows_portable, add_rows_portable,
      combine_rows_portable,
      "portable", linear_portable,
      "portable", attend_portable,
  };
#if defined(__x86_64__)
  static constexpr Kernels kAvx2 = {
      "avx2", quantize_rows_avx2,
      "avx2", gemm_int8_avx2, /*block_bytes=*/1 << 19,
      "avx2", /*fp8_element_size=*/4, widen_fp32_portable, gemm_fp8_avx2, /*fp8_block_bytes=*/1 << 21,
      "avx2", norm_rows_avx2, activate_rows_avx2, rotate_rows_avx2, add_rows_avx2,
      combine_rows_avx2,
      "portable", linear_portable,
      "avx2", attend_avx2,
  };
  static constexpr Kernels kAvxVnni = {
      "avx2", quantize_rows_avx2,
      "avxvnni", gemm_int8_avxvnni, /*block_bytes=*/1 << 19,
      "avx2", /*fp8_element_size=*/4, widen_fp32_portable, gemm_fp8_avx2, /*fp8_block_bytes=*/1 << 21,
      "avx2", norm_rows_avx2, activate_rows_avx2, rotate_rows_avx2, add_rows_avx2,
      combine_rows_avx2,
      "portable", linear_portable,
      "avx2", attend_avx2,
  };
  static constexpr Kernels kAvx512Vnni = {
      "avx512", quantize_rows_avx512,
      "avx512vnni", gemm_int8_avx512vnni, /*block_bytes=*/1 << 19,
      "avx512", /*fp8_element_size=*/4, widen_fp32_portable, gemm_fp8_avx512, /*fp8_block_bytes=*/1 << 21,
      "avx512", norm_rows_avx512, activate_rows_avx512, rotate_rows_avx512, add_rows_avx512,
      combine_rows_avx512,
      "portable", linear_portable,
      "avx512", attend_avx512,
  };
  static constexpr Kernels kAvx512Bf16 = {
      "avx512", quantize_rows_avx512,
      "avx512vnni", gemm_int8_avx512vnni, /*block_bytes=*/1 << 19,
      "avx512bf16", /*fp8_element_size=*/2, widen_bf16_avx512, gemm_fp8_avx512bf16, /*fp8_block_bytes=*/1 << 21,
      "avx512", norm_rows_avx512, activate_rows_avx512, rotate_rows_avx512, add_rows_avx512,
      combine_rows_avx512,
      "avx512bf16", linear_avx512_bf16,
      "avx512bf16", attend_avx512_bf16,
  };
  static constexpr Kernels kAmx = {
      "avx512", quantize_rows_avx512,
      "amx", gemm_int8_amx, /*block_bytes=*/1 << 24,  // it cuts blocks that fit itself
      "amx", /*fp8_element_size=*/2, widen_bf16_avx512, gemm_fp8_amx, /*fp8_block_bytes=*/1 << 24,
      "avx512", norm_rows_avx512, activate_rows_avx512, rotate_rows_avx512, add_rows_avx512,
      combine_rows_avx512,
      "amx", linear_amx,
      "amx", attend_amx,
  };
  static const Kernels kSlowBf16 = [] {
    Kernels kernels = kAvx512Bf16;
    kernels.attention_name = "avx512";
    kernels.attend = attend_avx512;
    return kernels;
  }();
  switch (isa) {
    case Isa::kAmx:
      return kAmx;
    case Isa::kAvx512Bf16:
      return has_slow_bf16() ? kSlowBf16 : kAvx512Bf16;
    case Isa::kAvx512Vnni:
      return kAvx512Vnni;
    case Isa::kAvxVnni:
      return kAvxVnni;
    case Isa::kAvx2:
      return kAvx2;
    case Isa::kPortable:
      break;
  }
#else
  static_cast<void>(isa);
#endif
  return kPortable;
}
// clang-format on

}  // namespace sq
