// Rows are done in chunks that are first widened to fp32, so that one loop per step serves all input types and vectorizes.
#include <cstring>

#include "cpu/kernels/quantize.h"

namespace sq {
namespace {

constexpr int64_t kChunk = 512;

template <class T>
void widen(const T* x, const float* smooth, int64_t count, float* v) {
  for (int64_t i = 0; i < count; ++i) v[i] = to_float(x[i]);
  if (smooth != nullptr) {
    for (int64_t i = 0; i < count; ++i) v[i] /= smooth[i];
  }
}

void load_chunk(const QuantizeArgs& args, int64_t row, int64_t k, int64_t count, float* v) {
  const int64_t offset = row * args.k + k;
  const float* smooth = args.smooth == nullptr ? nullptr : args.smooth + k;
  switch (args.x_dtype) {
    case DType::kBFloat16:
      return widen(static_cast<const BFloat16*>(args.x) + offset, smooth, count, v);
    case DType::kFloat16:
      return widen(static_cast<const Float16*>(args.x) + offset, smooth, count, v);
    default:
      return widen(static_cast<const float*>(args.x) + offset, smooth, count, v);
  }
}

int64_t chunk_size(int64_t k, int64_t total) { return total - k < kChunk ? total - k : kChunk; }

// The bits of the row's largest magnitude: as integers they order like magnitudes, and every NaN is above infinity.
uint32_t absmax_bits(const QuantizeArgs& args, int64_t row) {
  float v[kChunk];
  int32_t largest = 0;
  for (int64_t k = 0; k < args.k; k += kChunk) {
    const int64_t count = chunk_size(k, args.k);
    load_chunk(args, row, k, count, v);
    for (int64_t i = 0; i < count; ++i) {
      const auto bits = static_cast<int32_t>(float_bits(v[i]) & ~kFloatSign);
      largest = bits > largest ? bits : largest;
    }
  }
  return static_cast<uint32_t>(largest);
}

float clamp(float value, float limit) {
  // A NaN fails both comparisons and stays.
  value = value > limit ? limit : value;
  return value < -limit ? -limit : value;
}

void convert_int8(const float* v, int64_t count, float multiplier, uint8_t flip, uint8_t* q) {
  // Adding 1.5 * 2^23 rounds to an integer, to nearest even, which is then in the low bits.
  constexpr float kRound = 12582912.0f;
  for (int64_t i = 0; i < count; ++i) {
    const float value = v[i] * multiplier;
    const float finite = value == value ? value : 0.0f;
    q[i] = static_cast<uint8_t>(float_bits(clamp(finite, 127.0f) + kRound)) ^ flip;
  }
}

template <class Cast>
void convert_float8(const float* v, int64_t count, float multiplier, float limit, uint8_t* q, Cast cast) {
  for (int64_t i = 0; i < count; ++i) q[i] = cast(clamp(v[i] * multiplier, limit));
}

void convert_row(const QuantizeArgs& args, int64_t row, float multiplier, uint8_t* q) {
  float v[kChunk];
  for (int64_t k = 0; k < args.k; k += kChunk) {
    const int64_t count = chunk_size(k, args.k);
    load_chunk(args, row, k, count, v);
    const float limit = quantized_max(args.q_dtype);
    switch (args.q_dtype) {
      case DType::kFloat8E4M3:
        convert_float8(v, count, multiplier, limit, q + k, float_to_float8_e4m3);
        break;
      case DType::kFloat8E5M2:
        convert_float8(v, count, multiplier, limit, q + k, float_to_float8_e5m2);
        break;
      default:
        convert_int8(v, count, multiplier, args.flip, q + k);
    }
  }
}

void quantize_rows_portable(const QuantizeArgs& args, Range rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    uint8_t* q = args.q + row * args.q_stride;
    const RowScale scale = row_scale(args, args.scale == nullptr ? 0 : absmax_bits(args, row));
    if (args.scale != nullptr) args.scale[row] = scale.scale;
    if (scale.multiplier == 0.0f) {
      std::memset(q, args.flip, args.k);
    } else {
      convert_row(args, row, scale.multiplier, q);
    }
  }
}

}  // namespace

constexpr QuantizeKernels kQuantizePortable = {"portable", quantize_rows_portable};

}  // namespace sq
