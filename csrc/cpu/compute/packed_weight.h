// Weights in the layout of the kernels.
#pragma once

#include <vector>

#include "common/gemm_checks.h"
#include "common/tensors.h"
#include "cpu/compute/parallel.h"
#include "cpu/kernels/pack.h"

namespace sq {

// Of one weight [N, K], or of each of [E, N, K].
inline void parallel_pack(const Tensor& b, uint8_t* packed) {
  const int64_t n = b.size(b.dim() - 2), k = b.size(b.dim() - 1);
  const int64_t panels = panel_count(n), matrices = b.dim() == 3 ? b.size(0) : 1;
  const auto* source = pointer<uint8_t>(b);
  const DType dtype = kernel_dtype(b.scalar_type());
  parallel_rows(matrices * panels, panel_bytes(k), [&](Range range) {
    for (int64_t panel = range.begin; panel < range.end;) {
      const int64_t matrix = panel / panels, first = panel % panels;
      const int64_t last = std::min(panels, first + range.end - panel);
      pack_panels(source + matrix * n * k, n, k, dtype, packed + matrix * panels * panel_bytes(k), {first, last});
      panel += last - first;
    }
  });
}

// A weight that was checked, packed now if it did not come packed.
class PackedWeight {
 public:
  PackedWeight(const GemmShape& shape, const LayerTensors& layer)
      : shape_(shape),
        packed_(shape.is_packed ? as_contiguous(layer.weight) : packed(as_contiguous(layer.weight))),
        scale_(as_contiguous(layer.scale)),
        bias_(as_contiguous(layer.bias)) {}

  int64_t n() const { return shape_.n; }
  int64_t k() const { return shape_.k; }
  DType dtype() const { return kernel_dtype(packed_.scalar_type()); }

  // A product that writes contiguous rows of n values to y.
  GemmArgs product(void* y, DType y_dtype) const {
    GemmArgs args{};
    args.n = shape_.n;
    args.k = shape_.k;
    args.b = pointer<uint8_t>(packed_);
    args.b_dtype = dtype();
    args.b_scale = pointer<float>(scale_);
    args.b_scale_step = scale_.numel() == 1 ? 0 : 1;
    args.bias = bias_.has_value() ? bias_->const_data_ptr() : nullptr;
    args.bias_dtype = bias_.has_value() ? kernel_dtype(bias_->scalar_type()) : DType::kFloat32;
    args.y = y;
    args.y_dtype = y_dtype;
    return args;
  }
  GemmArgs product(const Tensor& y) const { return product(y.mutable_data_ptr(), kernel_dtype(y.scalar_type())); }

  // Of [N, K], or each of [E, N, K].
  static Tensor packed(const Tensor& weight) {
    const int64_t n = weight.size(weight.dim() - 2), k = weight.size(weight.dim() - 1);
    std::vector<int64_t> shape = {panel_count(n), padded_k(k) / 4 + 1, kPanel, 4};
    if (weight.dim() == 3) shape.insert(shape.begin(), weight.size(0));
    Tensor packed = empty_cpu(shape, weight.scalar_type());
    advise_huge_pages(packed);
    parallel_pack(weight, static_cast<uint8_t*>(packed.mutable_data_ptr()));
    return packed;
  }

 private:
  GemmShape shape_;
  Tensor packed_, scale_;
  OptionalTensor bias_;
};

}  // namespace sq
