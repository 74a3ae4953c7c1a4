// Which kernels run: those of the best instruction set of this CPU, or of the one that SMOOTHQUANT_CPU_ISA or a test names.
#pragma once

#include <string>

#include "cpu/kernels/attention.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/linear.h"
#include "cpu/kernels/norm_activation.h"
#include "cpu/kernels/quantize.h"

namespace sq {

// A family of each kind.
struct Kernels {
  const QuantizeKernels& quantize;
  const GemmKernels &int8, &fp8;
  const NormActivationKernels& norm_activation;
  const LinearKernels& linear;
  const AttentionKernels& attention;
};

struct Isa {
  const char* name;
  std::string (*find_why_not)();  // see why_not
  Kernels kernels;
  const Kernels* if_slow_bf16 = nullptr;  // instead, where has_slow_bf16()
};

struct IsaList {
  const Isa *first, *last;

  const Isa* begin() const { return first; }
  const Isa* end() const { return last; }
};

// Those of the architecture that this was compiled for, the one to prefer first. The last one runs everywhere.
IsaList isas();

// The one of this name, or null.
const Isa* find_isa(const std::string& name);

// Why this machine cannot run an ISA of the list; empty where it can. The first call asks about all of them.
const std::string& why_not(const Isa& isa);

const Kernels& kernels_of(const Isa& isa);

// The ISA in use. Throws std::runtime_error if SMOOTHQUANT_CPU_ISA names none, or one that this machine cannot run.
const Isa& current_isa();

// Makes the named ISA the one in use, for the whole process. Throws as current_isa() does.
void set_isa(const std::string& name);

inline const Kernels& current_kernels() { return kernels_of(current_isa()); }

}  // namespace sq
