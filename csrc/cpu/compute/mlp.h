// An MLP of 8-bit layers, for the ops that contain one.
#pragma once

#include "cpu/compute/packed_weight.h"
#include "cpu/compute/quantized_activation.h"

namespace sq {

struct Mlp {
  PackedWeight gate;
  std::optional<PackedWeight> up;
  PackedWeight down;
  Activation activation;
  float input_scale, down_input_scale;  // static scales, or 0
  int64_t rotate, down_rotate;          // blocks of x and of what down reads, or 0

  // Rows done together, so that what lies between the products stays within a cache that threads share.
  int64_t rows_together(int64_t element) const {
    constexpr int64_t kBytes = int64_t{16} << 20, kFewest = 64, kMost = 512;
    const int64_t row_bytes = std::max<int64_t>(1, gate.n() * (element * (up.has_value() ? 2 : 1) + 1));
    return std::clamp(kBytes / row_bytes / 32 * 32, kFewest, kMost);
  }

  // y [m, n] of x [m, k], both contiguous and of this dtype.
  void run(const Kernels& kernels, const void* x, int64_t m, DType dtype, void* y) const {
    const int64_t k = gate.k(), inner = gate.n(), element = element_size(dtype);
    const int64_t block = std::min(m, rows_together(element));
    Plan plan;
    QuantizedActivation input(kernels, block, k, gate.dtype(), plan), hidden(kernels, block, inner, down.dtype(), plan);
    const auto gate_plane = plan.add(block * inner * element);
    const auto up_plane = plan.add(up.has_value() ? block * inner * element : 0);
    Scratch scratch(plan.bytes());
    input.place(scratch);
    hidden.place(scratch);
    uint8_t *gates = gate_plane.in(scratch), *ups = up_plane.in(scratch);

    for (int64_t row = 0; row < m; row += block) {
      const int64_t rows = std::min(block, m - row);
      input.quantize(static_cast<const uint8_t*>(x) + row * k * element, dtype, input_scale, rotate, rows);
      std::vector<GemmArgs> first = {gate.product(gates, dtype)};
      if (up.has_value()) first.push_back(up->product(ups, dtype));
      input.multiply(first, gate.dtype(), rows);

      ActivateArgs source{};
      source.activation = activation;
      source.k = inner;
      source.gate = gates;
      source.up = up.has_value() ? ups : nullptr;
      source.dtype = dtype;
      parallel_activate_quantize(kernels, source, hidden.target(down_input_scale), down_rotate, rows);
      hidden.multiply({down.product(static_cast<uint8_t*>(y) + row * down.n() * element, dtype)}, down.dtype(), rows);
    }
  }
};

}  // namespace sq
