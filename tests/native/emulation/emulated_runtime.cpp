// CUDA's runtime as far as the ops use it, with its rule for shared memory: what a kernel declares and what a launch adds
// are 48 KB together, unless more was asked for; then they are what a block can have at most.
#include "native/emulation/emulated_runtime.h"

#include <cuda_runtime.h>

#include <map>
#include <mutex>

namespace {

constexpr int kMost = 227 * 1024;  // of sm_90
// What every kernel is taken to declare: as much as ours do at most, see tests/packaging/test_cuda_build.py.
constexpr int kStatic = 1024;

std::mutex mutex;
std::map<const void*, int> most_dynamic;  // where it was asked for
thread_local cudaError_t last_error = cudaSuccess;
thread_local bool is_device_set = false;

}  // namespace

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid argument"; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int) {
  is_device_set = true;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = kMost;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->sharedSizeBytes = kStatic;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  const std::lock_guard<std::mutex> lock(mutex);
  if (value + kStatic > kMost) return last_error = cudaErrorInvalidValue;
  most_dynamic[kernel] = value;
  return cudaSuccess;
}

namespace emulated {

bool can_start(const void* kernel, int64_t shared_bytes) {
  constexpr int kFree = 48 * 1024;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto asked = most_dynamic.find(kernel);
  if (shared_bytes <= (asked == most_dynamic.end() ? kFree - kStatic : asked->second)) return true;
  last_error = cudaErrorInvalidValue;
  return false;
}

bool has_context() { return is_device_set; }

}  // namespace emulated
