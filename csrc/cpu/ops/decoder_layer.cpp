// w8a8_decoder_layer_ on the CPU: what a Llama-like layer does between its input and its output, in one call.
#include <torch/csrc/stable/library.h>

#include <string>

#include "common/gemm_checks.h"
#include "common/norm_activation_checks.h"
#include "common/op_string.h"
#include "cpu/compute/kv_cache.h"
#include "cpu/compute/mlp.h"
#include "cpu/compute/parallel_attention.h"
#include "cpu/kernels/epilogue.h"

namespace sq {
namespace {

constexpr const char* kOp = "w8a8_decoder_layer_";

enum Layer { kQ, kK, kV, kO, kGate, kUp, kDown, kLayers };
struct Role {
  const char* layer;
  const char* input;
};
constexpr Role kRoles[kLayers] = {{"q", "x"},    {"k", "x"},  {"v", "x"},           {"o", "attention"},
                                  {"gate", "x"}, {"up", "x"}, {"down", "act(gate)"}};
constexpr const char* kInputs[] = {"q, k, v", "o", "gate, up", "down"};  // of input_scale

// The layers of the lists, checked one by one; K is what each reads.
class Layers {
 public:
  Layers(const Tensor& x, const LayerLists& layers) : x_(x), layers_(layers) {
    SQ_CHECK(layers.size() == kLayers, kOp, ": weight has ", layers.size(),
             " elements, expected 7 (q, k, v, o, gate, up, down)");
    check_lists(kOp, layers);
  }

  PackedWeight weight(Layer layer, int64_t k) const {
    const LayerNames names = names_in_lists(kRoles[layer].input, layer, kRoles[layer].layer);
    const ScalarType dtype = layers_.weight[0].scalar_type(), own = layers_.weight[layer].scalar_type();
    SQ_CHECK(own == dtype, kOp, ": weight[0] (q) is ", dtype_text(dtype), " and ", names.weight, " is ",
             dtype_text(own), ", expected one dtype");
    return {check_layer(kOp, names, x_, k, layers_[layer]), layers_[layer]};
  }

 private:
  const Tensor& x_;
  const LayerLists& layers_;
};

// Parts of one scratch buffer: sizes first, addresses when it exists.
class Plan {
 public:
  int64_t add(int64_t bytes) {
    const int64_t offset = bytes_;
    bytes_ += Scratch::align(bytes);
    return offset;
  }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

void check_norm_weight(const char* name, const Tensor& weight, const Tensor& x, int64_t k) {
  check_same_device(kOp, name, weight, "x", x);
  check_float(kOp, name, weight.scalar_type());
  SQ_CHECK(weight.numel() == k, kOp, ": ", name, " has ", weight.numel(), " elements, expected ", k);
}

void check_angles(const char* name, const Tensor& angles, const Tensor& x) {
  check_same_device(kOp, name, angles, "x", x);
  SQ_CHECK(angles.scalar_type() == x.scalar_type(), kOp, ": ", name, " is ", dtype_text(angles.scalar_type()),
           " and x is ", dtype_text(x.scalar_type()), ", expected the same dtype");
  SQ_CHECK(angles.dim() == 3 && (angles.size(0) == 1 || angles.size(0) == x.size(0)) && angles.size(1) == x.size(1) &&
               angles.size(2) % 2 == 0 && angles.size(2) > 0,
           kOp, ": ", name, " has shape ", shape_text(angles), ", expected [1 or B, T, D] with an even D");
}

Tensor w8a8_decoder_layer_cpu(const Tensor& x_in, const Tensor& norm_in, const Tensor& post_norm_in, double eps,
                              double post_eps, double offset, const std::vector<Tensor>& weight,
                              const std::vector<Tensor>& weight_scale, const OptionalTensors& bias,
                              const OptionalTensors& input_scale, const Tensor& cos_in, const Tensor& sin_in,
                              const Tensor& keys, const Tensor& values, int64_t past, const OptionalTensor& mask_in,
                              double scale, bool causal, const OpString& activation, const OptionalTensor& keys_scale,
                              const OptionalTensor& values_scale, const OptionalTensor& q_norm,
                              const OptionalTensor& k_norm, double head_eps) {
  check_float(kOp, "x", x_in.scalar_type());
  SQ_CHECK(x_in.dim() == 3, kOp, ": x has shape ", shape_text(x_in), ", expected [B, T, K]");
  check_norm_weight("norm", norm_in, x_in, x_in.size(2));
  check_norm_weight("post_norm", post_norm_in, x_in, x_in.size(2));
  check_angles("cos", cos_in, x_in);
  check_angles("sin", sin_in, x_in);
  check_optional_list(kOp, "input_scale", input_scale, 4);
  SQ_CHECK(past >= 0, kOp, ": past is ", past, ", expected 0 or more");
  SQ_CHECK(scale > 0 && std::isfinite(scale), kOp, ": scale is ", scale, ", expected a positive finite number");
  const int64_t batch = x_in.size(0), time = x_in.size(1), k = x_in.size(2), m = batch * time, d = cos_in.size(2);
  SQ_CHECK(q_norm.has_value() == k_norm.has_value(), kOp,
           ": one of q_norm and k_norm is given, expected both or neither");
  if (q_norm.has_value()) {
    check_norm_weight("q_norm", *q_norm, x_in, d);
    check_norm_weight("k_norm", *k_norm, x_in, d);
  }
  const auto static_scale = [&](size_t index) {
    return checked_static_scale(kOp, {"input_scale", index, kInputs[index]}, element_of(input_scale, index), "x", x_in);
  };

  const LayerLists lists{weight, weight_scale, bias};
  const Layers layers(x_in, lists);
  const PackedWeight q = layers.weight(kQ, k), key = layers.weight(kK, k), value = layers.weight(kV, k);
  const PackedWeight o = layers.weight(kO, q.n());
  const PackedWeight gate = layers.weight(kGate, k), up = layers.weight(kUp, k);
  SQ_CHECK(q.n() % d == 0 && key.n() % d == 0 && key.n() > 0 && q.n() % key.n() == 0 && value.n() == key.n(), kOp,
           ": q, k and v have N=", q.n(), ", ", key.n(), " and ", value.n(), ", expected multiples of D=", d);
  SQ_CHECK(up.n() == gate.n(), kOp, ": weight[5] (up) has N=", up.n(), ", but weight[4] (gate) has N=", gate.n());
  const PackedWeight down = layers.weight(kDown, gate.n());
  SQ_CHECK(o.n() == k && down.n() == k, kOp, ": o and down have N=", o.n(), " and ", down.n(), ", expected K=", k);
  const Mlp mlp{gate, up, down, activation_kind(kOp, activation), static_scale(2), static_scale(3)};
  const int64_t heads = q.n() / d, kv_heads = key.n() / d, total = past + time;
  SQ_CHECK(keys_scale.has_value() == values_scale.has_value(), kOp, ": one of keys_scale and values_scale is given, ",
           "expected both or neither");
  const CacheBuffer k_cache(kOp, "keys", keys, "keys_scale", keys_scale, x_in, kv_heads, total, d);
  const CacheBuffer v_cache(kOp, "values", values, "values_scale", values_scale, x_in, kv_heads, total, d);
  if (mask_in.has_value()) {
    const Tensor& mask = *mask_in;
    check_same_device(kOp, "mask", mask, "x", x_in);
    SQ_CHECK(mask.scalar_type() == ScalarType::Bool && mask.dim() == 4 &&
                 (mask.size(0) == 1 || mask.size(0) == batch) && (mask.size(1) == 1 || mask.size(1) == heads) &&
                 mask.size(2) == time && mask.size(3) == total,
             kOp, ": mask is ", dtype_text(mask.scalar_type()), " ", shape_text(mask), ", expected bool [1 or ", batch,
             ", 1 or ", heads, ", ", time, ", ", total, "]");
  }

  const Tensor x = as_contiguous(x_in), cos = as_contiguous(cos_in), sin = as_contiguous(sin_in);
  const Tensor norm = as_contiguous(norm_in), post_norm = as_contiguous(post_norm_in);
  const OptionalTensor mask = as_contiguous(mask_in);
  Tensor y = empty_cpu(shape_of(x), x.scalar_type());
  if (m == 0) return y;
  const Kernels& kernels = current_kernels();
  const DType dtype = kernel_dtype(x.scalar_type());
  const int64_t element = element_size(dtype), row_bytes = k * element;

  // The attention reads the rotated q and writes its result where q was.
  QuantizedActivation input(kernels, m, k, q.dtype()), attended(kernels, m, q.n(), o.dtype());
  Plan plan;
  const int64_t input_at = plan.add(input.bytes()), attended_at = plan.add(attended.bytes());
  const int64_t weights_at = plan.add(2 * (k + d) * static_cast<int64_t>(sizeof(float)));
  const int64_t normed_at = plan.add(m * row_bytes), sum_at = plan.add(m * row_bytes),
                part_at = plan.add(m * row_bytes);
  const int64_t q_at = plan.add(m * q.n() * element), rotated_at = plan.add(m * q.n() * element);
  const int64_t k_at = plan.add(m * key.n() * element), v_at = plan.add(m * key.n() * element);
  // Keys that are to be quantized wait here for it.
  const int64_t rotated_k_at = plan.add(k_cache.is_int8() ? m * key.n() * element : 0);
  Scratch scratch(plan.bytes());
  uint8_t* memory = scratch.data();
  input.place(memory + input_at);
  attended.place(memory + attended_at);
  auto* norm_weights = reinterpret_cast<float*>(memory + weights_at);
  const auto widen_weight = [offset](const Tensor& weight, float* target) {
    widen(weight.const_data_ptr(), kernel_dtype(weight.scalar_type()), static_cast<float>(offset), weight.numel(),
          target);
  };
  float *post_norm_weights = norm_weights + k, *q_norm_weights = post_norm_weights + k,
        *k_norm_weights = q_norm_weights + d;
  widen_weight(norm, norm_weights);
  widen_weight(post_norm, post_norm_weights);
  if (q_norm.has_value()) {
    widen_weight(as_contiguous(*q_norm), q_norm_weights);
    widen_weight(as_contiguous(*k_norm), k_norm_weights);
  }

  NormArgs norm_args{};
  norm_args.norm = Norm::kRms;
  norm_args.k = k;
  norm_args.x = x.const_data_ptr();
  norm_args.x_dtype = norm_args.y_dtype = dtype;
  norm_args.weight = norm_weights;
  norm_args.eps = static_cast<float>(eps);
  const auto normalize = [&] {
    parallel_rows(m, row_bytes, [&](Range range) {
      NormArgs own = norm_args;
      own.y = memory + normed_at + range.begin * row_bytes;
      kernels.norm_activation.norm(own, range);
    });
  };
  normalize();
  input.quantize(memory + normed_at, dtype, static_scale(0), m);
  input.multiply(
      {q.product(memory + q_at, dtype), key.product(memory + k_at, dtype), value.product(memory + v_at, dtype)},
      q.dtype(), m);

  // In place, every head on its own.
  NormArgs head_norm{};
  head_norm.norm = Norm::kRms;
  head_norm.k = d;
  head_norm.x_dtype = head_norm.y_dtype = dtype;
  head_norm.eps = static_cast<float>(head_eps);
  const auto normalize_heads = [&](int64_t at, int64_t count, const float* weights, Range range) {
    NormArgs own = head_norm;
    own.weight = weights;
    own.x = memory + at;
    own.y = memory + at + range.begin * count * d * element;
    kernels.norm_activation.norm(own, {range.begin * count, range.end * count});
  };

  // q and the new keys are rotated, keys and values go behind those of before.
  const int64_t angle_batch = cos.size(0) == 1 ? 0 : time * d;
  RotateArgs rotate_q{dtype,
                      time,
                      heads,
                      d,
                      memory + q_at,
                      cos.const_data_ptr(),
                      sin.const_data_ptr(),
                      angle_batch,
                      memory + rotated_at,
                      time * heads * d,
                      d,
                      heads * d};
  RotateArgs rotate_k = rotate_q;
  rotate_k.heads = kv_heads;
  rotate_k.x = memory + k_at;
  if (k_cache.is_int8()) {
    rotate_k.y = memory + rotated_k_at;
    rotate_k.y_batch = time * key.n();
    rotate_k.y_time = key.n();
  } else {
    const AttentionStrides strides = k_cache.strides();
    rotate_k.y = k_cache.address(0, 0, past);
    rotate_k.y_batch = strides.batch;
    rotate_k.y_head = strides.head;
    rotate_k.y_time = strides.row;
  }
  parallel_rows(m, (q.n() + 2 * key.n()) * element, [&](Range range) {
    if (q_norm.has_value()) {
      normalize_heads(q_at, heads, q_norm_weights, range);
      normalize_heads(k_at, kv_heads, k_norm_weights, range);
    }
    kernels.norm_activation.rotate(rotate_q, range);
    kernels.norm_activation.rotate(rotate_k, range);
    for (int64_t row = range.begin; row < range.end; ++row) {
      const int64_t own_batch = row / time, token = past + row % time, offset = row * key.n() * element;
      if (k_cache.is_int8()) k_cache.put(kernels, own_batch, token, memory + rotated_k_at + offset);
      v_cache.put(kernels, own_batch, token, memory + v_at + offset);
    }
  });

  AttentionArgs attention{};
  attention.dtype = dtype;
  attention.heads = heads;
  attention.group = heads / kv_heads;
  attention.q_len = time;
  attention.kv_len = total;
  attention.d = attention.v_d = d;
  attention.q = memory + rotated_at;
  attention.k = k_cache.data();
  attention.v = v_cache.data();
  attention.k_scale = k_cache.scale();
  attention.v_scale = v_cache.scale();
  attention.q_strides = {time * heads * d, d, heads * d};
  attention.k_strides = k_cache.strides();
  attention.v_strides = v_cache.strides();
  attention.k_scale_strides = k_cache.scale_strides();
  attention.v_scale_strides = v_cache.scale_strides();
  if (mask.has_value()) {
    attention.mask = pointer<uint8_t>(*mask);
    attention.mask_strides = {mask->size(0) == 1 ? 0 : mask->stride(0), mask->size(1) == 1 ? 0 : mask->stride(1),
                              mask->stride(2)};
  }
  attention.scale = static_cast<float>(scale);
  attention.causal = causal;
  attention.y = memory + q_at;
  parallel_attention(kernels, attention, batch);
  attended.quantize(memory + q_at, dtype, static_scale(1), m);
  attended.multiply({o.product(memory + part_at, dtype)}, o.dtype(), m);

  norm_args.x = memory + part_at;
  norm_args.residual = x.const_data_ptr();
  norm_args.sum = memory + sum_at;
  norm_args.weight = post_norm_weights;
  norm_args.eps = static_cast<float>(post_eps);
  normalize();
  mlp.run(kernels, memory + normed_at, m, dtype, memory + part_at);
  const AddArgs add{dtype, k, memory + part_at, memory + sum_at, y.mutable_data_ptr()};
  parallel_rows(m, 3 * row_bytes, [&](Range range) { kernels.norm_activation.add(add, range); });
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sq, CPU, m) { m.impl("w8a8_decoder_layer_", TORCH_BOX(&w8a8_decoder_layer_cpu)); }

}  // namespace sq
