// What the CPU ops run on; none of these takes a tensor, so that they have no device.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <stdexcept>
#include <string>

#include "kernels/kernels.h"

namespace sq {
namespace {

std::string cpu_isa() { return isa_name(current_isa()); }

std::string cpu_isa_why_not(std::string name) {
  for (Isa isa : kIsas) {
    if (name == isa_name(isa)) return why_not(isa);
  }
  throw std::runtime_error("cpu_isa_why_not: there is no instruction set '" + name + "'");
}

std::string cpu_kernel(std::string family) {
  const Kernels& kernels = current_kernels();
  if (family == "quantize") return kernels.quantize_name;
  if (family == "pack") return "portable";
  if (family == "gemm_int8") return kernels.gemm_int8_name;
  if (family == "gemm_fp8") return kernels.gemm_fp8_name;
  if (family == "rows") return kernels.rows_name;
  if (family == "linear") return kernels.linear_name;
  if (family == "attention") return kernels.attention_name;
  throw std::runtime_error("cpu_kernel: there is no family '" + family + "'");
}

void set_cpu_isa(std::string name) { set_isa(name); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_kernel", TORCH_BOX(&cpu_kernel));
  m.impl("cpu_isa_why_not", TORCH_BOX(&cpu_isa_why_not));
  m.impl("_set_cpu_isa", TORCH_BOX(&set_cpu_isa));
}

}  // namespace sq
