// A call of the runtime, which makes what the driver's own callers expect to be there.
#include "cuda/compute/context.h"

#include <cuda_runtime.h>

#include "common/checks.h"

namespace sq {

void make_context(int device) {
  static thread_local bool is_made = false;
  if (is_made) return;
  const cudaError_t error = cudaSetDevice(device);  // from CUDA 12 on it makes the context too
  SQ_CHECK(error == cudaSuccess, "device ", device, ": ", cudaGetErrorString(error));
  is_made = true;
}

}  // namespace sq
