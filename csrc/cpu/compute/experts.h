// A mixture of experts of 8-bit layers on the CPU: what w8a8_experts computes.
//   quantize the tokens once; sort (token, slot) pairs by expert and copy their 8-bit rows into that order;
//   gate and up of all experts in one parallel region; activate and quantize; down in another; each token's weighted sum
//   in the order of its slots. So no bit depends on the number of threads, nor on which tokens came together.
#pragma once

#include <cstring>
#include <vector>

#include "cpu/compute/packed_weight.h"
#include "cpu/compute/quantized_activation.h"

namespace sq {

// The weights [E, N, K] of all experts, packed now if they did not come packed.
class ExpertWeights {
 public:
  ExpertWeights(const GemmShape& shape, int64_t experts, const LayerTensors& layers)
      : weight_(shape, layers),
        packed_bytes_(panel_count(shape.n) * panel_bytes(shape.k)),
        scales_(layers.scale.numel() == experts && !shape.is_packed ? 1 : shape.n) {}

  int64_t n() const { return weight_.n(); }
  int64_t k() const { return weight_.k(); }
  DType dtype() const { return weight_.dtype(); }

  // A product with one expert's weight.
  GemmArgs product(int64_t expert, void* y, DType y_dtype) const {
    GemmArgs args = weight_.product(y, y_dtype);
    args.b += expert * packed_bytes_;
    args.b_scale += expert * scales_;
    args.b_scale_step = scales_ == 1 ? 0 : 1;
    if (args.bias != nullptr) {
      args.bias = static_cast<const uint8_t*>(args.bias) + expert * args.n * element_size(args.bias_dtype);
    }
    return args;
  }

 private:
  PackedWeight weight_;
  int64_t packed_bytes_;
  int64_t scales_;  // of an expert
};

// Which pairs of a token and one of its slots go to which expert, in a stable order.
struct Dispatch {
  std::vector<int64_t> tokens;     // [pairs], sorted by expert: the token of each
  std::vector<int64_t> positions;  // [tokens * top_k]: where a slot's pair is in that order, -1 for one without expert
  std::vector<Range> ranges;       // [E]: the pairs of each expert

  Dispatch(const int64_t* index, int64_t token_count, int64_t top_k, int64_t experts)
      : positions(token_count * top_k, -1), ranges(experts) {
    std::vector<int64_t> counts(experts, 0);
    for (int64_t slot = 0; slot < token_count * top_k; ++slot) {
      if (index[slot] < experts) ++counts[index[slot]];
    }
    int64_t pairs = 0;
    for (int64_t expert = 0; expert < experts; ++expert) {
      ranges[expert] = {pairs, pairs};
      pairs += counts[expert];
    }
    tokens.resize(pairs);
    for (int64_t slot = 0; slot < token_count * top_k; ++slot) {
      if (index[slot] >= experts) continue;
      const int64_t at = ranges[index[slot]].end++;
      positions[slot] = at;
      tokens[at] = slot / top_k;
    }
  }

  int64_t pairs() const { return static_cast<int64_t>(tokens.size()); }
};

struct Experts {
  int64_t experts, top_k;
  ExpertWeights gate;
  std::optional<ExpertWeights> up;
  ExpertWeights down;
  Activation activation;
  int64_t rotate, down_rotate;  // blocks of x and of what down reads, or 0

  // Tokens done together, in even blocks: as many as memory that is kept for the next call has room for, because the
  // weights are read once for each block.
  int64_t tokens_together(int64_t tokens, int64_t element) const {
    constexpr int64_t kBytes = int64_t{62} << 20, kFewest = 64;
    const int64_t planes = up.has_value() ? 2 : 1;
    const int64_t pair_bytes =
        padded_k(gate.k()) + padded_k(gate.n()) + 2 * kRowPad + gate.n() * element * planes + down.n() * 4;
    const int64_t most = std::max(kFewest, kBytes / std::max<int64_t>(1, pair_bytes * top_k));
    return std::max<int64_t>(1, div_up(tokens, div_up(tokens, most)));
  }

  // y [tokens, n] of x [tokens, k], both contiguous and of this dtype; index [tokens, top_k] with E for no expert.
  void run(const Kernels& kernels, const void* x, const int64_t* index, const float* weights, int64_t tokens,
           DType dtype, void* y) const {
    if (tokens == 0) return;
    const int64_t element = element_size(dtype), block = tokens_together(tokens, element);
    for (int64_t token = 0; token < tokens; token += block) {
      run_block(kernels, static_cast<const uint8_t*>(x) + token * gate.k() * element, index + token * top_k,
                weights + token * top_k, std::min(block, tokens - token), dtype,
                static_cast<uint8_t*>(y) + token * down.n() * element);
    }
  }

 private:
  void run_block(const Kernels& kernels, const uint8_t* x, const int64_t* index, const float* weights, int64_t tokens,
                 DType dtype, uint8_t* y) const {
    const Dispatch dispatch(index, tokens, top_k, experts);
    const int64_t pairs = dispatch.pairs(), k = gate.k(), inner = gate.n(), element = element_size(dtype);
    // A kernel may read up to 31 rows behind those of the last expert.
    constexpr int64_t kBehind = 31;
    Plan plan;
    QuantizedActivation input(kernels, pairs + kBehind, k, gate.dtype(), plan);
    QuantizedActivation hidden(kernels, pairs + kBehind, inner, down.dtype(), plan);
    const auto gate_plane = plan.add(pairs * inner * element);
    const auto up_plane = plan.add(up.has_value() ? pairs * inner * element : 0);
    const auto down_sums = plan.add<float>(pairs * down.n());
    const auto token_rows = plan.add(tokens * k);  // quantized once
    const auto token_scales = plan.add<float>(tokens);
    Scratch scratch(plan.bytes());
    input.place(scratch);
    hidden.place(scratch);
    uint8_t *gates = gate_plane.in(scratch), *ups = up_plane.in(scratch), *q = token_rows.in(scratch);
    float *downs = down_sums.in(scratch), *scale = token_scales.in(scratch);

    QuantizeArgs args = input.target(0.0f);
    args.q = q;
    args.q_stride = k;
    args.scale = scale;
    args.x = x;
    args.x_dtype = dtype;
    parallel_quantize(kernels, args, rotate, tokens);
    parallel_rows(pairs, k, [&](Range rows) {
      for (int64_t row = rows.begin; row < rows.end; ++row) {
        const int64_t token = dispatch.tokens[row];
        std::memcpy(input.q() + row * input.q_stride(), q + token * k, static_cast<size_t>(k));
        input.scales()[row] = scale[token];
      }
    });

    input.multiply(products(dispatch, {&gate, up.has_value() ? &*up : nullptr}, {gates, ups}, dtype), gate.dtype(),
                   pairs);
    ActivateArgs source{};
    source.activation = activation;
    source.k = inner;
    source.gate = gates;
    source.up = up.has_value() ? ups : nullptr;
    source.dtype = dtype;
    parallel_activate_quantize(kernels, source, hidden.target(0.0f), down_rotate, pairs);
    hidden.multiply(products(dispatch, {&down}, {downs}, DType::kFloat32), down.dtype(), pairs);

    CombineArgs combine{};
    combine.k = down.n();
    combine.count = top_k;
    combine.x = downs;
    combine.rows = dispatch.positions.data();
    combine.weights = weights;
    combine.y = y;
    combine.dtype = dtype;
    parallel_rows(tokens, top_k * down.n() * 4, [&](Range rows) { kernels.norm_activation.combine(combine, rows); });
  }

  // Of every expert that has rows, with each of these weights.
  static std::vector<RowsProduct> products(const Dispatch& dispatch, const std::vector<const ExpertWeights*>& weights,
                                           const std::vector<void*>& outputs, DType dtype) {
    std::vector<RowsProduct> products;
    for (size_t expert = 0; expert < dispatch.ranges.size(); ++expert) {
      const Range rows = dispatch.ranges[expert];
      if (rows.begin == rows.end) continue;
      for (size_t i = 0; i < weights.size(); ++i) {
        if (weights[i] == nullptr) continue;
        products.push_back({weights[i]->product(static_cast<int64_t>(expert), outputs[i], dtype), rows});
      }
    }
    return products;
  }
};

}  // namespace sq
