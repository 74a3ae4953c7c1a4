// Facts about devices, looked up once each.
#include "cuda/compute/devices.h"

#include <cuda_runtime.h>

#include <atomic>
#include <string>

#include "common/checks.h"
#include "cuda/kernels/shared_memory.h"

namespace sq {
namespace {

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

}  // namespace

std::string cuda_archs() { return SQ_CUDA_ARCHS; }

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
  return once(known, device, [&] { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - kMostStatic; });
}

int64_t l2_bytes(int device) {
  static std::atomic<int> known[kDeviceCount];
  return once(known, device, [&] { return attribute(cudaDevAttrL2CacheSize, device); });
}

}  // namespace sq
