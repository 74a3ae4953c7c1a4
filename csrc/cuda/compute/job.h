// A product as every way to multiply is asked for it, see way_table.h.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/gemm_checks.h"
#include "cuda/compute/gemm_plan.h"
#include "cuda/compute/launch.h"
#include "cuda/kernels/gemm.h"
#include "cuda/kernels/tile_gemm.h"

namespace sq {

// The rows of `epilogue` that a product of some rows finishes.
inline Epilogue epilogue_of_rows(Epilogue epilogue, const Rows& rows) {
  epilogue.m = rows.end - rows.begin;
  epilogue.a_scale += rows.begin * epilogue.a_scale_step;
  const int64_t bytes = rows.begin * epilogue.n * static_cast<int64_t>(element_size(epilogue.y_dtype));
  epilogue.y = static_cast<uint8_t*>(epilogue.y) + bytes;
  if (epilogue.residual != nullptr) epilogue.residual = static_cast<const uint8_t*>(epilogue.residual) + bytes;
  return epilogue;
}

// The tensors are contiguous, of checked shapes, and not empty.
struct ProductJob {
  const char* op;
  const Tensor &a, &b, &a_scale, &b_scale;
  const OptionalTensor& bias;
  ScalarType out_dtype;
  TileJob pointers;  // of them all, but for y
  std::optional<Tensor> y;

  int device() const { return a.get_device_index(); }

  // y [..., N], made when something is about to be written there.
  Tensor& result() {
    if (!y.has_value()) y = empty_like_device(a, replace_last(a, pointers.epilogue.n), out_dtype);
    return *y;
  }

  // The same product of some rows.
  TileJob of_rows(const Rows& rows) {
    TileJob part = pointers;
    part.a += rows.begin * part.k;
    part.epilogue.y = result().mutable_data_ptr();
    part.epilogue = epilogue_of_rows(part.epilogue, rows);
    return part;
  }
};

// What a way did not compute: rows, and why. No rows: it computed all.
struct Refusal {
  std::vector<Rows> rows;
  std::string reason;
};

// What is left to do of a part after a way that does not end with launch_epilogue or the kernel for few rows, which add
// the residual themselves.
inline void add_residual(const Epilogue& epilogue, const Tensor& like) {
  if (epilogue.residual == nullptr) return;
  launch_add_residual(epilogue, current_stream(like));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace sq
