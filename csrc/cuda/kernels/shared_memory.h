// How much shared memory a block may have, and asking for more.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <mutex>
#include <set>
#include <utility>

namespace sq {

// Of a block, what the kernel declares and what the launch adds together, unless more was asked for.
constexpr int64_t kFreeShared = 48 * 1024;
// What a kernel of ours declares at most: 8 warps' sums of 8 x 4 results in skinny.cuh.
constexpr int kMostStatic = 1024;

// Lets blocks of a kernel have as much as the current device can give, once a kernel and device.
inline cudaError_t ask_for_most_shared(const void* kernel) {
  static std::mutex mutex;
  static std::set<std::pair<int, const void*>> asked;
  int device = 0, most = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  if (asked.count({device, kernel}) != 0) return cudaSuccess;
  cudaFuncAttributes own{};
  if (const cudaError_t error = cudaFuncGetAttributes(&own, kernel); error != cudaSuccess) return error;
  const cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  const int dynamic = most - static_cast<int>(own.sharedSizeBytes);
  const cudaError_t set = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic);
  if (set == cudaSuccess) asked.insert({device, kernel});
  return set;
}

// So that a launch may add `bytes`.
inline cudaError_t allow_shared(const void* kernel, int64_t bytes) {
  return bytes + kMostStatic <= kFreeShared ? cudaSuccess : ask_for_most_shared(kernel);
}

}  // namespace sq
