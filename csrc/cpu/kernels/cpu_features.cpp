#include "cpu/kernels/cpu_features.h"

#if defined(__x86_64__)

#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sq {
namespace {

struct Cpuid {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;

  explicit Cpuid(unsigned leaf, unsigned part = 0) { __get_cpuid_count(leaf, part, &eax, &ebx, &ecx, &edx); }
};

bool bit(unsigned word, int index) { return (word >> index & 1) != 0; }

// Whether the operating system saves these parts of the register file (XCR0) on a context switch.
bool saves_state(unsigned long long parts) {
  if (!bit(Cpuid(1).ecx, 27)) return false;  // OSXSAVE
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return ((static_cast<unsigned long long>(high) << 32 | low) & parts) == parts;
}

}  // namespace

std::string why_no_avx2() {
  const Cpuid one(1);
  if (!bit(Cpuid(7).ebx, 5) || !bit(one.ecx, 12) || !bit(one.ecx, 29)) return "this CPU has no AVX2, FMA or F16C";
  constexpr unsigned long long kYmm = 0x6;  // SSE, the upper halves of the ymm registers
  return saves_state(kYmm) ? "" : "the operating system does not save AVX registers";
}

std::string why_no_avx_vnni() {
  if (std::string reason = why_no_avx2(); !reason.empty()) return reason;
  return bit(Cpuid(7, 1).eax, 4) ? "" : "this CPU has no AVX-VNNI";
}

std::string why_no_avx512_vnni() {
  const Cpuid one(1), seven(7);
  const bool avx512 =
      bit(seven.ebx, 16) && bit(seven.ebx, 17) && bit(seven.ebx, 30) && bit(seven.ebx, 31);  // F DQ BW VL
  if (!avx512 || !bit(seven.ecx, 11)) return "this CPU has no AVX512-VNNI";
  if (!bit(one.ecx, 12) || !bit(one.ecx, 29)) return "this CPU has no FMA or F16C";
  constexpr unsigned long long kZmm = 0xe6;  // SSE, AVX, opmask, both halves of the zmm registers
  return saves_state(kZmm) ? "" : "the operating system does not save AVX512 registers";
}

std::string why_no_avx512_bf16() {
  if (std::string reason = why_no_avx512_vnni(); !reason.empty()) return reason;
  return bit(Cpuid(7, 1).eax, 5) && bit(Cpuid(7).ecx, 1) ? "" : "this CPU has no AVX512-BF16 or no AVX512-VBMI";
}

std::string why_no_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  if (std::string reason = why_no_avx512_bf16(); !reason.empty()) return reason;
  const Cpuid seven(7);
  if (!bit(seven.edx, 24) || !bit(seven.edx, 25)) return "this CPU has no AMX-INT8";
  if (!bit(seven.edx, 22)) return "this CPU has no AMX-BF16";
  constexpr unsigned long long kTiles = 0x60000;
  if (!saves_state(kTiles)) return "the operating system does not save AMX tiles";
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 ? "" : "Linux does not permit AMX to this process";
#else
  return "AMX is supported on Linux only";
#endif
}

bool has_slow_bf16() {
  unsigned eax, ebx = 0, ecx, edx;
  __get_cpuid(0, &eax, &ebx, &ecx, &edx);
  return ebx == signature_INTEL_ebx;
}

}  // namespace sq

#endif
