// A Llama-like layer between its input and its output, in one call:
//   n = rms_norm(x);  q, k, v = its 8-bit layers of n;  q and k are normed a head (where that is asked) and rotated;
//   k and v go to the cache;  h = x + o(attention(q, cache));  y = h + mlp(rms_norm(h))
#pragma once

#include "cpu/compute/kv_cache.h"
#include "cpu/compute/mlp.h"
#include "cpu/compute/norm.h"
#include "cpu/compute/parallel_attention.h"

namespace sq {

struct DecoderNorms {
  const Tensor &norm, &post_norm;         // [k]
  const OptionalTensor &q_norm, &k_norm;  // [d], both or neither
  float eps, post_eps, head_eps;
  double offset;  // added to all of them
};

// What one call brings, and where its result goes.
struct DecoderTokens {
  int64_t batch, time, past;
  int64_t length;  // of the keys that are attended to: past + time, or more of the cache
  const void* x;   // [batch, time, k], contiguous, as y
  DType dtype;
  void* y;
  const void *cos, *sin;  // [1 or batch, time, d]
  bool has_one_angle_batch;
  const uint8_t* mask;  // null: none
  AttentionStrides mask_strides;
  float scale;
  bool causal;

  int64_t rows() const { return batch * time; }
};

struct DecoderLayer {
  PackedWeight q, k, v, o;
  Mlp mlp;
  DecoderNorms norms;
  float input_scale, o_input_scale;  // static scales, or 0
  int64_t rotate, o_rotate;          // blocks of what q and o read, or 0
  int64_t d;

  int64_t width() const { return q.k(); }
  int64_t heads() const { return q.n() / d; }
  int64_t kv_heads() const { return k.n() / d; }

  inline void run(const Kernels& kernels, const DecoderTokens& tokens, const CacheBuffer& keys,
                  const CacheBuffer& values) const;
};

// A call of a layer: its parts of one buffer, then its steps in their order.
class DecoderCall {
 public:
  DecoderCall(const DecoderLayer& layer, const Kernels& kernels, const DecoderTokens& tokens, const CacheBuffer& keys,
              const CacheBuffer& values)
      : layer_(layer),
        kernels_(kernels),
        tokens_(tokens),
        keys_(keys),
        values_(values),
        input_(kernels, rows_, layer.width(), layer.q.dtype(), plan_),
        attended_(kernels, rows_, layer.q.n(), layer.o.dtype(), plan_),
        scratch_(plan_.bytes()) {
    input_.place(scratch_);
    attended_.place(scratch_);
    const DecoderNorms& norms = layer.norms;
    widen_channels(norms.norm, norms.offset, norm_weight_.in(scratch_));
    widen_channels(norms.post_norm, norms.offset, post_norm_weight_.in(scratch_));
    if (!norms.q_norm.has_value()) return;
    widen_channels(*norms.q_norm, norms.offset, q_norm_weight_.in(scratch_));
    widen_channels(*norms.k_norm, norms.offset, k_norm_weight_.in(scratch_));
  }

  void run() {
    project();
    append();
    attend();
    finish();
  }

 private:
  void project() {
    NormArgs args{};
    args.x = tokens_.x;
    args.weight = norm_weight_.in(scratch_);
    args.eps = layer_.norms.eps;
    normalize(args);
    input_.quantize(normed(), dtype_, layer_.input_scale, layer_.rotate, rows_);
    input_.multiply({layer_.q.product(q(), dtype_), layer_.k.product(k(), dtype_), layer_.v.product(v(), dtype_)},
                    layer_.q.dtype(), rows_);
  }

  // q and the new keys are normed and rotated, keys and values go behind those of before.
  void append() {
    const int64_t heads = layer_.heads(), kv_heads = layer_.kv_heads(), key_bytes = layer_.k.n() * element_;
    const RotateArgs rotate_q = rotation_of_q(), rotate_k = rotation_of_k();
    parallel_rows(rows_, (layer_.q.n() + 2 * layer_.k.n()) * element_, [&](Range range) {
      if (layer_.norms.q_norm.has_value()) {
        normalize_heads(q(), heads, q_norm_weight_.in(scratch_), range);
        normalize_heads(k(), kv_heads, k_norm_weight_.in(scratch_), range);
      }
      kernels_.norm_activation.rotate(rotate_q, range);
      kernels_.norm_activation.rotate(rotate_k, range);
      for (int64_t row = range.begin; row < range.end; ++row) {
        const int64_t batch = row / tokens_.time, token = tokens_.past + row % tokens_.time;
        if (keys_.is_int8()) keys_.put(kernels_, batch, token, rotated_k_.in(scratch_) + row * key_bytes);
        values_.put(kernels_, batch, token, v() + row * key_bytes);
      }
    });
  }

  // Reads the rotated q and writes its result where q was.
  void attend() {
    const int64_t heads = layer_.heads(), d = layer_.d;
    AttentionArgs args{};
    args.dtype = dtype_;
    args.heads = heads;
    args.group = heads / layer_.kv_heads();
    args.q_len = tokens_.time;
    args.kv_len = tokens_.length;
    args.d = args.v_d = d;
    args.q = rotated_q_.in(scratch_);
    args.k = keys_.data();
    args.v = values_.data();
    args.k_scale = keys_.scale();
    args.v_scale = values_.scale();
    args.q_strides = {tokens_.time * heads * d, d, heads * d};
    args.k_strides = keys_.strides();
    args.v_strides = values_.strides();
    args.k_scale_strides = keys_.scale_strides();
    args.v_scale_strides = values_.scale_strides();
    args.mask = tokens_.mask;
    args.mask_strides = tokens_.mask_strides;
    args.scale = tokens_.scale;
    args.causal = tokens_.causal;
    args.y = q();
    parallel_attention(kernels_, args, tokens_.batch);
  }

  void finish() {
    uint8_t* part = part_.in(scratch_);
    attended_.quantize(q(), dtype_, layer_.o_input_scale, layer_.o_rotate, rows_);
    attended_.multiply({layer_.o.product(part, dtype_)}, layer_.o.dtype(), rows_);
    NormArgs args{};
    args.x = part;
    args.residual = tokens_.x;
    args.sum = sum_.in(scratch_);
    args.weight = post_norm_weight_.in(scratch_);
    args.eps = layer_.norms.post_eps;
    normalize(args);
    layer_.mlp.run(kernels_, normed(), rows_, dtype_, part);
    const AddArgs add{dtype_, width_, part, sum_.in(scratch_), tokens_.y};
    parallel_rows(rows_, 3 * row_bytes_, [&](Range range) { kernels_.norm_activation.add(add, range); });
  }

  // Of whole rows, to normed().
  void normalize(NormArgs args) {
    args.norm = Norm::kRms;
    args.k = width_;
    args.x_dtype = args.y_dtype = dtype_;
    parallel_rows(rows_, row_bytes_, [&](Range range) {
      NormArgs own = args;
      own.y = normed() + range.begin * row_bytes_;
      kernels_.norm_activation.norm(own, range);
    });
  }

  // In place, every head of these rows on its own.
  void normalize_heads(uint8_t* x, int64_t count, const float* weight, Range range) {
    NormArgs args{};
    args.norm = Norm::kRms;
    args.k = layer_.d;
    args.x_dtype = args.y_dtype = dtype_;
    args.eps = layer_.norms.head_eps;
    args.weight = weight;
    args.x = x;
    args.y = x + range.begin * count * layer_.d * element_;
    kernels_.norm_activation.norm(args, {range.begin * count, range.end * count});
  }

  RotateArgs rotation_of_q() {
    const int64_t time = tokens_.time, heads = layer_.heads(), d = layer_.d;
    RotateArgs args{};
    args.dtype = dtype_;
    args.time = time;
    args.heads = heads;
    args.d = d;
    args.x = q();
    args.cos = tokens_.cos;
    args.sin = tokens_.sin;
    args.angle_batch = tokens_.has_one_angle_batch ? 0 : time * d;
    args.y = rotated_q_.in(scratch_);
    args.y_batch = time * heads * d;
    args.y_head = d;
    args.y_time = heads * d;
    return args;
  }

  // Into the cache, or where keys wait that are to be quantized.
  RotateArgs rotation_of_k() {
    RotateArgs args = rotation_of_q();
    args.heads = layer_.kv_heads();
    args.x = k();
    if (keys_.is_int8()) {
      args.y = rotated_k_.in(scratch_);
      args.y_batch = tokens_.time * layer_.k.n();
      args.y_time = layer_.k.n();
    } else {
      const AttentionStrides strides = keys_.strides();
      args.y = keys_.address(0, 0, tokens_.past);
      args.y_batch = strides.batch;
      args.y_head = strides.head;
      args.y_time = strides.row;
    }
    return args;
  }

  uint8_t* normed() { return normed_.in(scratch_); }
  uint8_t* q() { return q_.in(scratch_); }
  uint8_t* k() { return k_.in(scratch_); }
  uint8_t* v() { return v_.in(scratch_); }

  const DecoderLayer& layer_;
  const Kernels& kernels_;
  const DecoderTokens& tokens_;
  const CacheBuffer &keys_, &values_;
  const int64_t rows_ = tokens_.rows(), width_ = layer_.width();
  const DType dtype_ = tokens_.dtype;
  const int64_t element_ = element_size(dtype_), row_bytes_ = width_ * element_;

  // In this order: the plan, what it is of, the buffer.
  Plan plan_;
  QuantizedActivation input_, attended_;
  using Bytes = Plan::Part<uint8_t>;
  using Floats = Plan::Part<float>;
  const Floats norm_weight_ = plan_.add<float>(width_), post_norm_weight_ = plan_.add<float>(width_);
  const Floats q_norm_weight_ = plan_.add<float>(layer_.d), k_norm_weight_ = plan_.add<float>(layer_.d);
  const Bytes normed_ = plan_.add(rows_ * row_bytes_), sum_ = plan_.add(rows_ * row_bytes_);
  const Bytes part_ = plan_.add(rows_ * row_bytes_);
  const Bytes q_ = plan_.add(rows_ * layer_.q.n() * element_), rotated_q_ = plan_.add(rows_ * layer_.q.n() * element_);
  const Bytes k_ = plan_.add(rows_ * layer_.k.n() * element_), v_ = plan_.add(rows_ * layer_.k.n() * element_);
  const Bytes rotated_k_ = plan_.add(keys_.is_int8() ? rows_ * layer_.k.n() * element_ : 0);
  Scratch scratch_;
};

void DecoderLayer::run(const Kernels& kernels, const DecoderTokens& tokens, const CacheBuffer& keys,
                       const CacheBuffer& values) const {
  if (tokens.rows() > 0) DecoderCall(*this, kernels, tokens, keys, values).run();
}

}  // namespace sq
