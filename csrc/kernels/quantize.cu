// Chooses the instance of each quantize kernel and launches it.
#include "kernels/quantize.h"

#include <cuda_runtime.h>

#include "kernels/quantize.cuh"

namespace sq {
namespace {

template <typename T>
struct Type {
  using type = T;
};

// body(Type<T>{}, Type<Q>{}) for the types that the tags name.
template <typename T, typename Body>
void with_quantized_type(QuantizedType quantized, const Body& body) {
  switch (quantized) {
    case QuantizedType::kInt8:
      return body(Type<T>{}, Type<Int8>{});
    case QuantizedType::kE4M3:
      return body(Type<T>{}, Type<E4M3>{});
    case QuantizedType::kE5M2:
      return body(Type<T>{}, Type<E5M2>{});
  }
}

template <typename Body>
void with_types(InputType input, QuantizedType quantized, const Body& body) {
  switch (input) {
    case InputType::kFloat32:
      return with_quantized_type<float>(quantized, body);
    case InputType::kBFloat16:
      return with_quantized_type<BFloat16>(quantized, body);
    case InputType::kFloat16:
      return with_quantized_type<Half>(quantized, body);
  }
}

template <typename T, typename Q, int kGroups>
void launch_rows(const QuantizePerToken& job, int threads, cudaStream_t stream) {
  const T* x = static_cast<const T*>(job.x);
  const bool wide = can_move_groups(x, job.smooth, job.q, job.columns);
  quantize_per_token_kernel<T, Q, kGroups>
      <<<static_cast<unsigned>(job.rows), threads, 0, stream>>>(x, job.smooth, job.q, job.scale, job.columns, wide);
}

}  // namespace

void launch_quantize_per_token(const QuantizePerToken& job, void* stream) {
  if (job.rows == 0) return;
  const RowConfig config = row_config(job.columns);
  with_types(job.input, job.quantized, [&](auto t, auto q) {
    using T = typename decltype(t)::type;
    using Q = typename decltype(q)::type;
    const auto launch = [&] {
      switch (config.groups) {
        case 1:
          return launch_rows<T, Q, 1>;
        case 2:
          return launch_rows<T, Q, 2>;
        case 4:
          return launch_rows<T, Q, 4>;
        case 8:
          return launch_rows<T, Q, 8>;
        default:
          return launch_rows<T, Q, 0>;
      }
    }();
    launch(job, config.threads, static_cast<cudaStream_t>(stream));
  });
}

void launch_quantize_static(const QuantizeStatic& job, void* stream) {
  if (job.count == 0) return;
  constexpr int kThreads = 256;
  constexpr int64_t kMaxBlocks = 8192;  // enough to fill any GPU; the threads step over the rest
  const int64_t needed = (job.count + kThreads * kGroup - 1) / (kThreads * kGroup);
  const auto blocks = static_cast<unsigned>(needed < kMaxBlocks ? needed : kMaxBlocks);
  with_types(job.input, job.quantized, [&](auto t, auto q) {
    using T = typename decltype(t)::type;
    using Q = typename decltype(q)::type;
    const T* x = static_cast<const T*>(job.x);
    const bool wide = is_group_aligned(x) && is_group_aligned(job.q);
    quantize_static_kernel<T, Q>
        <<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(x, job.scale, job.q, job.count, wide);
  });
}

}  // namespace sq
