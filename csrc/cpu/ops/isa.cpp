// What the CPU ops run on; none of these takes a tensor, so that they have no device.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <stdexcept>
#include <string>
#include <utility>

#include "common/op_string.h"
#include "cpu/kernels/dispatch.h"

namespace sq {
namespace {

std::string cpu_isa() { return current_isa().name; }

std::string cpu_isas() {
  std::string names;
  for (const Isa& isa : isas()) names += std::string(names.empty() ? "" : ",") + isa.name;
  return names;
}

std::string cpu_isa_why_not(const OpString& name) {
  if (const Isa* isa = find_isa(name)) return why_not(*isa);
  throw std::runtime_error("cpu_isa_why_not: there is no instruction set '" + name.value + "'");
}

std::string cpu_kernel(const OpString& family) {
  const Kernels& kernels = current_kernels();
  const std::pair<const char*, const char*> names[] = {{"quantize", kernels.quantize.name},
                                                       {"pack", "portable"},
                                                       {"gemm_int8", kernels.int8.name},
                                                       {"gemm_fp8", kernels.fp8.name},
                                                       {"norm_activation", kernels.norm_activation.name},
                                                       {"linear", kernels.linear.name},
                                                       {"attention", kernels.attention.name}};
  for (const auto& [known, name] : names) {
    if (family.value == known) return name;
  }
  throw std::runtime_error("cpu_kernel: there is no family '" + family.value + "'");
}

void set_cpu_isa(const OpString& name) { set_isa(name.value); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("cpu_isas", TORCH_BOX(&cpu_isas));
  m.impl("cpu_kernel", TORCH_BOX(&cpu_kernel));
  m.impl("cpu_isa_why_not", TORCH_BOX(&cpu_isa_why_not));
  m.impl("_set_cpu_isa", TORCH_BOX(&set_cpu_isa));
}

}  // namespace sq
