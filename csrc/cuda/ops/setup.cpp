// What Python asks and tells this library before the first product: see smoothquant_ext/ops/.
#include <torch/csrc/stable/library.h>

#include <string>

#include "common/op_string.h"
#include "cuda/compute/context.h"
#include "cuda/compute/cublaslt.h"
#include "cuda/compute/devices.h"
#include "cuda/compute/launch.h"
#include "cuda/compute/ways.h"

namespace sq {
namespace {

std::string cuda_archs_cuda() { return cuda_archs(); }

void set_cuda_ways_cuda(const OpString& dtype, const OpString& table) { set_ways("_set_cuda_ways", dtype, table); }

std::string cuda_way_cuda(const OpString& dtype, int64_t rows) {
  return text_of(ranked_ways("_cuda_way", dtype, rows));
}

void cuda_warm_up_cuda(int64_t device) {
  constexpr const char* kOp = "_cuda_warm_up";
  SQ_CHECK(device >= 0 && device < kDeviceCount, kOp, ": there is no CUDA device ", device);
  const auto index = static_cast<int>(device);
  const DeviceGuard guard(index);
  make_context(index);
  lt_warm_up(kOp, index);
}

}  // namespace
}  // namespace sq

// Of no tensor, so that no device chooses the implementation.
STABLE_TORCH_LIBRARY_IMPL(sq, CompositeExplicitAutograd, m) {
  m.impl("_cuda_archs", TORCH_BOX(&sq::cuda_archs_cuda));
  m.impl("_set_cuda_ways", TORCH_BOX(&sq::set_cuda_ways_cuda));
  m.impl("_cuda_way", TORCH_BOX(&sq::cuda_way_cuda));
  m.impl("_cuda_warm_up", TORCH_BOX(&sq::cuda_warm_up_cuda));
}
