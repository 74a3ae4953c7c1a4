// Chooses the instance of each quantize kernel and launches it.
#include "kernels/quantize.h"

#include <cuda_runtime.h>

#include "kernels/quantize.cuh"

namespace sq {
namespace {

template <typename T, DType kQ>
struct Types {
  using X = T;
  static constexpr DType kQuantized = kQ;
};

// body(Types<T, kQ>{}) for the dtypes of a job.
template <typename T, typename Body>
void with_quantized_type(DType q_dtype, const Body& body) {
  switch (q_dtype) {
    case DType::kFloat8E4M3:
      return body(Types<T, DType::kFloat8E4M3>{});
    case DType::kFloat8E5M2:
      return body(Types<T, DType::kFloat8E5M2>{});
    default:
      return body(Types<T, DType::kInt8>{});
  }
}

template <typename Body>
void with_types(DType x_dtype, DType q_dtype, const Body& body) {
  switch (x_dtype) {
    case DType::kBFloat16:
      return with_quantized_type<BFloat16>(q_dtype, body);
    case DType::kFloat16:
      return with_quantized_type<Float16>(q_dtype, body);
    default:
      return with_quantized_type<float>(q_dtype, body);
  }
}

template <typename T, DType kQ, int kGroups>
void launch_rows(const QuantizePerToken& job, int threads, cudaStream_t stream) {
  const T* x = static_cast<const T*>(job.x);
  const bool wide = can_move_groups(x, job.smooth, job.q, job.columns);
  quantize_per_token_kernel<T, kQ, kGroups>
      <<<static_cast<unsigned>(job.rows), threads, 0, stream>>>(x, job.smooth, job.q, job.scale, job.columns, wide);
}

}  // namespace

void launch_quantize_per_token(const QuantizePerToken& job, void* stream) {
  if (job.rows == 0) return;
  const RowConfig config = row_config(job.columns);
  with_types(job.x_dtype, job.q_dtype, [&](auto types) {
    using T = typename decltype(types)::X;
    constexpr DType kQ = decltype(types)::kQuantized;
    const auto launch = [&] {
      switch (config.groups) {
        case 1:
          return launch_rows<T, kQ, 1>;
        case 2:
          return launch_rows<T, kQ, 2>;
        case 4:
          return launch_rows<T, kQ, 4>;
        case 8:
          return launch_rows<T, kQ, 8>;
        default:
          return launch_rows<T, kQ, 0>;
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
  with_types(job.x_dtype, job.q_dtype, [&](auto types) {
    using T = typename decltype(types)::X;
    constexpr DType kQ = decltype(types)::kQuantized;
    const T* x = static_cast<const T*>(job.x);
    const bool wide = is_group_aligned(x) && is_group_aligned(job.q);
    quantize_static_kernel<T, kQ>
        <<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(x, job.scale, job.q, job.count, wide);
  });
}

}  // namespace sq
