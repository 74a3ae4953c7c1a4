// w8a8_gemm on CUDA devices.
#include <torch/csrc/stable/library.h>

#include "common/gemm_checks.h"
#include "cuda/compute/product.h"

namespace sq {
namespace {

Tensor w8a8_gemm_cuda(const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                      const OptionalTensor& bias, ScalarType out_dtype) {
  const LayerTensors layer{b, b_scale, bias};
  const GemmShape shape = check_w8a8_gemm(a, a_scale, layer, out_dtype);
  const DeviceGuard guard(a.get_device_index());
  return multiply_cuda("w8a8_gemm", as_contiguous(a), as_contiguous(a_scale), layer, shape, out_dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CUDA, m) { m.impl("w8a8_gemm", TORCH_BOX(&w8a8_gemm_cuda)); }

}  // namespace sq
