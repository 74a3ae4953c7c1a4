#include "cpu/kernels/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <vector>

#include "cpu/kernels/cpu_features.h"

namespace sq {
namespace {

std::string always() { return ""; }

// The only list of instruction sets: a row each, and the rows of an architecture in the order of preference. Another
// architecture's come in an #elif of their own, in front of "portable".
// clang-format off
#if defined(__x86_64__)
constexpr Kernels kAvx512SlowBf16 =
    {kQuantizeAvx512,   kInt8Avx512Vnni, kFp8Avx512Bf16, kNormActivationAvx512,   kLinearAvx512Bf16, kAttentionAvx512};
#endif

constexpr Isa kIsas[] = {
#if defined(__x86_64__)
    {"amx", why_no_amx,
    {kQuantizeAvx512,   kInt8Amx,        kFp8Amx,        kNormActivationAvx512,   kLinearAmx,        kAttentionAmx}},
    {"avx512bf16", why_no_avx512_bf16,
    {kQuantizeAvx512,   kInt8Avx512Vnni, kFp8Avx512Bf16, kNormActivationAvx512,   kLinearAvx512Bf16, kAttentionAvx512Bf16},
     &kAvx512SlowBf16},
    {"avx512vnni", why_no_avx512_vnni,
    {kQuantizeAvx512,   kInt8Avx512Vnni, kFp8Avx512,     kNormActivationAvx512,   kLinearPortable,   kAttentionAvx512}},
    {"avxvnni", why_no_avx_vnni,
    {kQuantizeAvx2,     kInt8AvxVnni,    kFp8Avx2,       kNormActivationAvx2,     kLinearPortable,   kAttentionAvx2}},
    {"avx2", why_no_avx2,
    {kQuantizeAvx2,     kInt8Avx2,       kFp8Avx2,       kNormActivationAvx2,     kLinearPortable,   kAttentionAvx2}},
#endif
    {"portable", always,
    {kQuantizePortable, kInt8Portable,   kFp8Portable,   kNormActivationPortable, kLinearPortable,   kAttentionPortable}},
};
// clang-format on

const Isa& usable_isa(const std::string& name) {
  if (const Isa* isa = find_isa(name)) {
    if (why_not(*isa).empty()) return *isa;
    throw std::runtime_error("SMOOTHQUANT_CPU_ISA asks for " + name + ", but " + why_not(*isa));
  }
  std::string names;
  for (const Isa& isa : kIsas) names += std::string(names.empty() ? "" : ", ") + isa.name;
  throw std::runtime_error("SMOOTHQUANT_CPU_ISA is '" + name + "', expected one of " + names);
}

const Isa& first_isa() {
  if (const char* forced = std::getenv("SMOOTHQUANT_CPU_ISA"); forced != nullptr && *forced != '\0') {
    return usable_isa(forced);
  }
  const Isa* isa = std::begin(kIsas);
  while (!why_not(*isa).empty()) ++isa;
  return *isa;
}

std::atomic<const Isa*>& selected() {
  static std::atomic<const Isa*> isa{&first_isa()};
  return isa;
}

}  // namespace

IsaList isas() { return {std::begin(kIsas), std::end(kIsas)}; }

const Isa* find_isa(const std::string& name) {
  for (const Isa& isa : kIsas) {
    if (name == isa.name) return &isa;
  }
  return nullptr;
}

const std::string& why_not(const Isa& isa) {
  static const std::vector<std::string> reasons = [] {
    std::vector<std::string> found;
    for (const Isa& each : kIsas) found.push_back(each.find_why_not());
    return found;
  }();
  return reasons[static_cast<size_t>(&isa - kIsas)];
}

const Kernels& kernels_of(const Isa& isa) {
#if defined(__x86_64__)
  static const bool is_bf16_slow =
      has_slow_bf16();  // asked once: where the machine is virtual, cpuid takes a microsecond
  if (is_bf16_slow && isa.if_slow_bf16 != nullptr) return *isa.if_slow_bf16;
#endif
  return isa.kernels;
}

const Isa& current_isa() { return *selected().load(std::memory_order_relaxed); }

void set_isa(const std::string& name) { selected().store(&usable_isa(name), std::memory_order_relaxed); }

}  // namespace sq
