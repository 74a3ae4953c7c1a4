// The bodies of norm_activation.h in plain C++, for the compiler to vectorize: norm_activation_portable.cpp and others
// compile them for their instruction set, SQ_ROWS_NAME: SQ_ROWS_KERNELS is what its family is called, SQ_ROWS_TARGET the
// attribute of its functions, SQ_ROWS_LANES the floats of a register.
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/kernels/norm_activation.h"

#define SQ_ROWS_INLINE inline __attribute__((always_inline)) SQ_ROWS_TARGET

namespace sq {
namespace {

// Some of the lanes, as many as a register holds: loops over an array of floats are unrolled before they are vectorized.
constexpr int64_t kPartLanes = SQ_ROWS_LANES, kParts = kSumLanes / kPartLanes;
typedef float Part __attribute__((vector_size(kPartLanes * sizeof(float))));

template <class T>
SQ_ROWS_INLINE Part load_part(const T* x) {
  Part part;
  if constexpr (std::is_same_v<T, BFloat16>) {
    typedef uint16_t Halves __attribute__((vector_size(kPartLanes * sizeof(uint16_t))));
    typedef uint32_t Words __attribute__((vector_size(kPartLanes * sizeof(uint32_t))));
    Halves halves;
    std::memcpy(&halves, x, sizeof halves);
    const Words words = __builtin_convertvector(halves, Words) << 16;
    std::memcpy(&part, &words, sizeof part);
  } else if constexpr (std::is_same_v<T, float>) {
    std::memcpy(&part, x, sizeof part);
  } else {
    float values[kPartLanes];
    for (int64_t lane = 0; lane < kPartLanes; ++lane) values[lane] = to_float(x[lane]);
    std::memcpy(&part, values, sizeof part);
  }
  return part;
}

// The sum of x - mean, or of its squares.
template <bool kSquares, class T>
SQ_ROWS_INLINE float lane_sum(const T* x, float mean, int64_t k) {
  Part sums[kParts] = {};
  int64_t i = 0;
  for (; i + kSumLanes <= k; i += kSumLanes) {
#pragma GCC unroll 16
    for (int64_t part = 0; part < kParts; ++part) {
      const Part values = load_part(x + i + part * kPartLanes) - mean;
      sums[part] += kSquares ? values * values : values;
    }
  }
  float lanes[kSumLanes];
  std::memcpy(lanes, sums, sizeof lanes);
  for (int64_t lane = 0; i + lane < k; ++lane) {
    const float value = to_float(x[i + lane]) - mean;
    lanes[lane] += kSquares ? value * value : value;
  }
  for (int64_t half = kSumLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// target may be nothing else's memory; without that, the compiler would not vectorize.
template <class T>
SQ_ROWS_INLINE void add_row(const T* x, const T* residual, int64_t k, T* __restrict target) {
  for (int64_t i = 0; i < k; ++i) from_float(to_float(x[i]) + to_float(residual[i]), target + i);
}

template <class T, class Y>
SQ_ROWS_INLINE void scale_row(const T* x, float mean, float gain, const float* weight, const float* bias, int64_t k,
                              Y* __restrict y) {
  if (bias == nullptr) {
    for (int64_t i = 0; i < k; ++i) from_float((to_float(x[i]) - mean) * gain * weight[i], y + i);
  } else {
    for (int64_t i = 0; i < k; ++i) from_float((to_float(x[i]) - mean) * gain * weight[i] + bias[i], y + i);
  }
}

template <class T, class Y>
SQ_ROWS_INLINE void norm_rows(const NormArgs& args, Range rows) {
  const int64_t k = args.k;
  const float count = static_cast<float>(k);
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const T* x = static_cast<const T*>(args.x) + row * k;
    if (args.residual != nullptr) {
      T* sum = static_cast<T*>(args.sum) + row * k;
      add_row(x, static_cast<const T*>(args.residual) + row * k, k, sum);
      x = sum;
    }
    const float mean = args.norm == Norm::kLayer ? lane_sum<false>(x, 0.0f, k) / count : 0.0f;
    const float squares = lane_sum<true>(x, mean, k);
    const float gain = 1.0f / std::sqrt(squares / count + args.eps);
    scale_row(x, mean, gain, args.weight, args.bias, k, static_cast<Y*>(args.y) + (row - rows.begin) * k);
  }
}

template <Activation kActivation, class T>
SQ_ROWS_INLINE void activate_rows(const ActivateArgs& args, Range rows) {
  const int64_t begin = rows.begin * args.k, count = (rows.end - rows.begin) * args.k;
  const T* gate = static_cast<const T*>(args.gate) + begin;
  float* __restrict v = args.v;
  if (args.up == nullptr) {
    for (int64_t i = 0; i < count; ++i) v[i] = activate<kActivation>(to_float(gate[i]));
  } else {
    const T* up = static_cast<const T*>(args.up) + begin;
    for (int64_t i = 0; i < count; ++i) v[i] = activate<kActivation>(to_float(gate[i])) * to_float(up[i]);
  }
}

template <Activation kActivation>
SQ_ROWS_INLINE void activate_rows(const ActivateArgs& args, Range rows) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return activate_rows<kActivation, BFloat16>(args, rows);
    case DType::kFloat16:
      return activate_rows<kActivation, Float16>(args, rows);
    default:
      return activate_rows<kActivation, float>(args, rows);
  }
}

template <class T>
SQ_ROWS_INLINE void norm_rows(const NormArgs& args, Range rows) {
  args.y_dtype == args.x_dtype ? norm_rows<T, T>(args, rows) : norm_rows<T, float>(args, rows);
}

template <class T>
SQ_ROWS_INLINE float rounded(float value) {
  T target;
  from_float(value, &target);
  return to_float(target);
}

template <class T>
SQ_ROWS_INLINE void rotate_head(const T* x, const T* cos, const T* sin, int64_t d, T* __restrict y) {
  const int64_t half = d / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float product = rounded<T>(to_float(x[i]) * to_float(cos[i]));
    from_float(product + rounded<T>(-to_float(x[i + half]) * to_float(sin[i])), y + i);
  }
  for (int64_t i = half; i < d; ++i) {
    const float product = rounded<T>(to_float(x[i]) * to_float(cos[i]));
    from_float(product + rounded<T>(to_float(x[i - half]) * to_float(sin[i])), y + i);
  }
}

template <class T>
SQ_ROWS_INLINE void rotate_rows(const RotateArgs& args, Range rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t batch = row / args.time, time = row % args.time;
    const int64_t angle = batch * args.angle_batch + time * args.d;
    const T* x = static_cast<const T*>(args.x) + row * args.heads * args.d;
    T* y = static_cast<T*>(args.y) + batch * args.y_batch + time * args.y_time;
    for (int64_t head = 0; head < args.heads; ++head) {
      rotate_head(x + head * args.d, static_cast<const T*>(args.cos) + angle, static_cast<const T*>(args.sin) + angle,
                  args.d, y + head * args.y_head);
    }
  }
}

template <int64_t kHalf, size_t... kLane>
SQ_ROWS_INLINE Part lanes_apart(Part part, std::index_sequence<kLane...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(part, part, (kLane ^ kHalf)...);
#else
  typedef int32_t Lanes __attribute__((vector_size(sizeof(Part))));
  return __builtin_shuffle(part, Lanes{static_cast<int32_t>(kLane ^ kHalf)...});
#endif
}

// The steps of a Hadamard transform whose pairs are within a register: a + b in the lower lane of a pair, a - b in the upper.
template <int64_t kHalf = 1>
SQ_ROWS_INLINE Part hadamard_lanes(Part part) {
  Part signs;
  for (int64_t lane = 0; lane < kPartLanes; ++lane) signs[lane] = (lane & kHalf) == 0 ? 1.0f : -1.0f;
  part = lanes_apart<kHalf>(part, std::make_index_sequence<kPartLanes>()) + part * signs;
  if constexpr (2 * kHalf < kPartLanes) part = hadamard_lanes<2 * kHalf>(part);
  return part;
}

template <int64_t kBlock, class T>
SQ_ROWS_INLINE void hadamard_rows(const HadamardArgs& args, Range rows) {
  constexpr int64_t kCount = kBlock / kPartLanes;
  const float scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(kBlock)));
  const T* x = static_cast<const T*>(args.x) + rows.begin * args.k;
  for (int64_t first = 0; first < (rows.end - rows.begin) * args.k; first += kBlock) {
    Part parts[kCount];
#pragma GCC unroll 16
    for (int64_t i = 0; i < kCount; ++i) {
      parts[i] = load_part(x + first + i * kPartLanes);
      if (args.smooth != nullptr) parts[i] /= load_part(args.smooth + first % args.k + i * kPartLanes);
      parts[i] = hadamard_lanes(parts[i]);
    }
#pragma GCC unroll 8
    for (int64_t half = 1; half < kCount; half *= 2) {
#pragma GCC unroll 16
      for (int64_t i = 0; i < kCount; ++i) {
        if ((i & half) != 0) continue;
        const Part a = parts[i], b = parts[i + half];
        parts[i] = a + b;
        parts[i + half] = a - b;
      }
    }
#pragma GCC unroll 16
    for (int64_t i = 0; i < kCount; ++i) {
      const Part scaled = parts[i] * scale;
      std::memcpy(args.v + first + i * kPartLanes, &scaled, sizeof scaled);
    }
  }
}

template <class T>
SQ_ROWS_INLINE void hadamard_rows(const HadamardArgs& args, Range rows) {
  switch (args.block) {
    case 16:
      return hadamard_rows<16, T>(args, rows);
    case 32:
      return hadamard_rows<32, T>(args, rows);
    case 64:
      return hadamard_rows<64, T>(args, rows);
    case 128:
      return hadamard_rows<128, T>(args, rows);
    default:
      return hadamard_rows<256, T>(args, rows);
  }
}

template <class T>
SQ_ROWS_INLINE void add_rows(const AddArgs& args, Range rows) {
  const int64_t begin = rows.begin * args.k, count = (rows.end - rows.begin) * args.k;
  add_row(static_cast<const T*>(args.x) + begin, static_cast<const T*>(args.residual) + begin, count,
          static_cast<T*>(args.y) + begin);
}

template <class T>
SQ_ROWS_INLINE void combine_rows(const CombineArgs& args, Range rows) {
  constexpr int64_t kBlock = 512;  // columns whose sums stay in L1
  float sums[kBlock];
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t first = 0; first < args.k; first += kBlock) {
      const int64_t count = args.k - first < kBlock ? args.k - first : kBlock;
      for (int64_t i = 0; i < count; ++i) sums[i] = 0.0f;
      for (int64_t j = row * args.count; j < (row + 1) * args.count; ++j) {
        if (args.rows[j] < 0) continue;
        const float weight = args.weights[j];
        const float* x = args.x + args.rows[j] * args.k + first;
        for (int64_t i = 0; i < count; ++i) sums[i] = sums[i] + weight * x[i];
      }
      T* y = static_cast<T*>(args.y) + row * args.k + first;
      for (int64_t i = 0; i < count; ++i) from_float(sums[i], y + i);
    }
  }
}

SQ_ROWS_TARGET void run_combine(const CombineArgs& args, Range rows) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return combine_rows<BFloat16>(args, rows);
    case DType::kFloat16:
      return combine_rows<Float16>(args, rows);
    default:
      return combine_rows<float>(args, rows);
  }
}

SQ_ROWS_TARGET void run_rotate(const RotateArgs& args, Range rows) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return rotate_rows<BFloat16>(args, rows);
    case DType::kFloat16:
      return rotate_rows<Float16>(args, rows);
    default:
      return rotate_rows<float>(args, rows);
  }
}

SQ_ROWS_TARGET void run_hadamard(const HadamardArgs& args, Range rows) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return hadamard_rows<BFloat16>(args, rows);
    case DType::kFloat16:
      return hadamard_rows<Float16>(args, rows);
    default:
      return hadamard_rows<float>(args, rows);
  }
}

SQ_ROWS_TARGET void run_add(const AddArgs& args, Range rows) {
  switch (args.dtype) {
    case DType::kBFloat16:
      return add_rows<BFloat16>(args, rows);
    case DType::kFloat16:
      return add_rows<Float16>(args, rows);
    default:
      return add_rows<float>(args, rows);
  }
}

SQ_ROWS_TARGET void run_norm(const NormArgs& args, Range rows) {
  switch (args.x_dtype) {
    case DType::kBFloat16:
      return norm_rows<BFloat16>(args, rows);
    case DType::kFloat16:
      return norm_rows<Float16>(args, rows);
    default:
      return norm_rows<float, float>(args, rows);
  }
}

SQ_ROWS_TARGET void run_activate(const ActivateArgs& args, Range rows) {
  switch (args.activation) {
    case Activation::kSilu:
      return activate_rows<Activation::kSilu>(args, rows);
    case Activation::kGelu:
      return activate_rows<Activation::kGelu>(args, rows);
    case Activation::kGeluTanh:
      return activate_rows<Activation::kGeluTanh>(args, rows);
    case Activation::kRelu:
      return activate_rows<Activation::kRelu>(args, rows);
  }
}

}  // namespace

constexpr NormActivationKernels SQ_ROWS_KERNELS = {SQ_ROWS_NAME, run_norm, run_activate, run_rotate,
                                                   run_hadamard, run_add,  run_combine};

}  // namespace sq
