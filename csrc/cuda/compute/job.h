// A product as every way to multiply is asked for it, see way_table.h.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "common/gemm_checks.h"
#include "cuda/compute/gemm_plan.h"
#include "cuda/compute/launch.h"
#include "cuda/kernels/tile_gemm.h"

namespace sq {

// The rows of `epilogue` that a product of some rows finishes.
inline Epilogue epilogue_of_rows(Epilogue epilogue, const Rows& rows) {
  epilogue.m = rows.end - rows.begin;
  epilogue.a_scale += rows.begin * epilogue.a_scale_step;
  epilogue.y = static_cast<uint8_t*>(epilogue.y) + rows.begin * epilogue.n * element_size(epilogue.y_dtype);
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

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace sq
