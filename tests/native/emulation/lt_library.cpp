// Says which cuBLASLt the look-up finds, after loading the libraries that the arguments name, and what it says of a function
// that no version has. Compiled and run by tests/packaging/test_cuda_build.py.
#include "cuda/compute/cublaslt_library.h"

#include <dlfcn.h>

#include <cstdio>
#include <exception>

int main(int count, char** names) {
  for (int i = 1; i < count; ++i) {
    if (dlopen(names[i], RTLD_LAZY) == nullptr) std::printf("%s\n", dlerror());
  }
  try {
    std::printf("version %zu\n", sq::cublasLtGetVersion());
    sq::find_lt_function("cublasLtFrob");
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
  }
}
