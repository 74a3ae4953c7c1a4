// What this CPU and its operating system lack of an instruction set: a reason, or "" where it can be used.
#pragma once

#include <string>

namespace sq {

#if defined(__x86_64__)
std::string why_no_avx2();
std::string why_no_avx_vnni();  // vpdpbusd of 256 bits, in the encoding that needs no AVX-512
std::string why_no_avx512_vnni();
std::string why_no_avx512_bf16();  // what multiplies bf16, and the byte permutations that decode fp8 to it
std::string why_no_amx();          // asks Linux for leave to use the tile registers

// Whether vdpbf16ps of 512 bits takes so long that products in fp32 are faster: on Intel's Emerald Rapids attention takes
// 1.7 to 1.9 times as long with it (November 2026), where Zen 5 is twice as fast. Taken for all of Intel's processors.
bool has_slow_bf16();
#endif

}  // namespace sq
