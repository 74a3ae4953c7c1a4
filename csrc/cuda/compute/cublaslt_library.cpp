// Finds cuBLASLt in this process, and loads it only if torch has not.
#include "cuda/compute/cublaslt_library.h"

#include <dlfcn.h>

#include "common/checks.h"

namespace sq {
namespace {

struct Place {
  const char* name;
  int flags;
};
// A look-up in torch's library goes on through all that it was loaded with, so that it finds torch's own copy whatever that
// is called. The others are for a torch that keeps its copy to itself.
constexpr Place kPlaces[] = {
    {"libtorch_cuda.so", RTLD_NOLOAD}, {"libcublasLt.so.13", RTLD_NOLOAD}, {"libcublasLt.so.12", RTLD_NOLOAD},
    {"libcublasLt.so.13", 0},          {"libcublasLt.so.12", 0},
};
constexpr const char* kOldFunction = "cublasLtMatmul";  // every version has it

void* open_library() {
  for (const Place& place : kPlaces) {
    void* library = dlopen(place.name, RTLD_LAZY | place.flags);
    if (library != nullptr && dlsym(library, kOldFunction) != nullptr) return library;
  }
  fail(
      "cuBLASLt is not there: torch has not loaded it, and neither libcublasLt.so.13 nor libcublasLt.so.12 can be "
      "loaded");
}

}  // namespace

void* find_lt_function(const char* name) {
  static void* const library = open_library();
  if (void* const function = dlsym(library, name)) return function;
  Dl_info info{};
  dladdr(dlsym(library, kOldFunction), &info);
  fail("cuBLASLt: ", info.dli_fname, " has no function ", name, "; install the one that torch was released with");
}

}  // namespace sq
