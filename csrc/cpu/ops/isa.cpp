// What the CPU ops run on; none of these takes a tensor, so that they have no device.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <stdexcept>
#include <string>

#include "common/op_string.h"
#include "cpu/kernels/dispatch.h"

namespace sq {
namespace {

std::string cpu_isa() { return isa_name(current_isa()); }

std::string cpu_isa_why_not(const OpString& name) {
  for (Isa isa : kIsas) {
    if (name.value == isa_name(isa)) return why_not(isa);
  }
  throw std::runtime_error("cpu_isa_why_not: there is no instruction set '" + name.value + "'");
}

std::string cpu_kernel(const OpString& family) {
  const Kernels& kernels = current_kernels();
  if (family.value == "quantize") return kernels.quantize_name;
  if (family.value == "pack") return "portable";
  if (family.value == "gemm_int8") return kernels.gemm_int8_name;
  if (family.value == "gemm_fp8") return kernels.gemm_fp8_name;
  if (family.value == "rows") return kernels.rows_name;
  if (family.value == "linear") return kernels.linear_name;
  if (family.value == "attention") return kernels.attention_name;
  throw std::runtime_error("cpu_kernel: there is no family '" + family.value + "'");
}

void set_cpu_isa(const OpString& name) { set_isa(name.value); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_kernel", TORCH_BOX(&cpu_kernel));
  m.impl("cpu_isa_why_not", TORCH_BOX(&cpu_isa_why_not));
  m.impl("_set_cpu_isa", TORCH_BOX(&set_cpu_isa));
}

}  // namespace sq
