// Facts about devices, looked up once each; which kernels may run on them, told by Python when it loads this library.
#include "cuda/compute/devices.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "common/checks.h"
#include "common/op_string.h"

namespace sq {
namespace {

constexpr const char* kFamilies[] = {"quantize", "norm_activation", "gemm_int8",    "gemm_fp8",
                                     "gemm_mma", "gemm_wgmma",      "experts_int8", "experts_fp8"};
constexpr int kFamilyCount = 8, kArchCount = 256, kDeviceCount = 64;

std::atomic<bool> validated[kFamilyCount][kArchCount];

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  SQ_CHECK(error == cudaSuccess, "device ", device, ": ", cudaGetErrorString(error));
  return value;
}

template <typename Look>
int once(std::atomic<int> (&known)[kDeviceCount], int device, const Look& look) {
  SQ_CHECK(device >= 0 && device < kDeviceCount, "there is no CUDA device ", device);
  int value = known[device].load(std::memory_order_relaxed);
  if (value == 0) {
    value = look();
    known[device].store(value, std::memory_order_relaxed);
  }
  return value;
}

void set_cuda_validated(const OpString& name, int64_t arch) {
  const std::string& family = name;
  SQ_CHECK(arch > 0 && arch < kArchCount, "_set_cuda_validated: arch is ", arch, ", expected 10 * major + minor");
  for (int i = 0; i < kFamilyCount; ++i) {
    if (family != kFamilies[i]) continue;
    validated[i][arch] = true;
    return;
  }
  fail("_set_cuda_validated: there is no family '", family, "'");
}

// The architectures that this library has code for, as they were asked for when it was built.
std::string cuda_archs() { return SQ_CUDA_ARCHS; }

}  // namespace

int device_arch(int device) {
  static std::atomic<int> known[kDeviceCount];
  return once(known, device, [&] {
    return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
           attribute(cudaDevAttrComputeCapabilityMinor, device);
  });
}

CodeArch device_code(int device) { return code_arch(cuda_archs(), device_arch(device)); }

int multiprocessors(int device) {
  static std::atomic<int> known[kDeviceCount];
  return once(known, device, [&] { return attribute(cudaDevAttrMultiProcessorCount, device); });
}

int64_t shared_bytes(int device) {
  static std::atomic<int> known[kDeviceCount];
  constexpr int kFixed = 1024;
  return once(known, device, [&] { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - kFixed; });
}

void require_validated(const char* op, Family family, int device) {
  const int arch = device_arch(device);
  if (arch < kArchCount && validated[static_cast<int>(family)][arch]) return;
  const char* wanted = std::getenv("SMOOTHQUANT_UNVALIDATED_CUDA");
  SQ_CHECK(wanted != nullptr && std::strcmp(wanted, "1") == 0, op, ": its CUDA kernels (",
           kFamilies[static_cast<int>(family)], ") have not been validated on a GPU of compute capability ", arch / 10,
           ".", arch % 10, "; move the tensors to the CPU, or set SMOOTHQUANT_UNVALIDATED_CUDA=1 to try them");
}

}  // namespace sq

STABLE_TORCH_LIBRARY_IMPL(sq, CompositeExplicitAutograd, m) {
  m.impl("_set_cuda_validated", TORCH_BOX(&sq::set_cuda_validated));
  m.impl("_cuda_archs", TORCH_BOX(&sq::cuda_archs));
}
