// Which instruction set the kernels use: the best one of this CPU, or the one that SMOOTHQUANT_CPU_ISA or a test names.
#pragma once

#include <string>

namespace sq {

// In rising order of preference.
enum class Isa { kPortable, kAvx2, kAvxVnni, kAvx512Vnni, kAvx512Bf16, kAmx };

constexpr Isa kIsas[] = {Isa::kPortable, Isa::kAvx2, Isa::kAvxVnni, Isa::kAvx512Vnni, Isa::kAvx512Bf16, Isa::kAmx};

// "portable", "avx2", "avxvnni", "avx512vnni", "avx512bf16", "amx"
const char* isa_name(Isa isa);

// Why this machine cannot run the kernels of `isa`; empty where it can. The first call asks Linux for leave to use the
// tile registers of AMX.
const std::string& why_not(Isa isa);

// Whether vdpbf16ps of 512 bits takes so long that products in fp32 are faster: on Intel's Emerald Rapids attention takes
// 1.7 to 1.9 times as long with it (November 2026), where Zen 5 is twice as fast. Taken for all of Intel's processors.
bool has_slow_bf16();

// The ISA in use. Throws std::runtime_error if SMOOTHQUANT_CPU_ISA names none, or one that this machine cannot run.
Isa current_isa();

// Makes the named ISA the one in use, for the whole process. Throws as current_isa() does.
void set_isa(const std::string& name);

}  // namespace sq
