// The kernels of each instruction set, in one table.
#pragma once

#include "cpu/kernels/attention.h"
#include "cpu/kernels/cpu_features.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/linear.h"
#include "cpu/kernels/norm_activation.h"
#include "cpu/kernels/quantize.h"

namespace sq {

struct Kernels {
  const char* quantize_name;
  QuantizeRows quantize_rows;
  const char* gemm_int8_name;
  GemmRange gemm_int8;
  int64_t block_bytes;  // of activation that a thread should multiply at a time, so that it stays in L2
  const char* gemm_fp8_name;
  int64_t fp8_element_size;  // of what widen_fp8 makes
  WidenRows widen_fp8;
  GemmRange gemm_fp8;
  int64_t fp8_block_bytes;  // larger where every block decodes the weight anew
  const char* rows_name;
  NormRows norm_rows;
  ActivateRows activate_rows;
  RotateRows rotate_rows;
  AddRows add_rows;
  CombineRows combine_rows;
  const char* linear_name;
  LinearColumns linear;
  const char* attention_name;
  Attend attend;
};

const Kernels& kernels_of(Isa isa);

inline const Kernels& current_kernels() { return kernels_of(current_isa()); }

}  // namespace sq
