// Chooses the instances of the kernels of gemm.h and launches them.
#include "cuda/kernels/gemm.h"

#include "cuda/kernels/add.cuh"
#include "cuda/kernels/epilogue.cuh"
#include "cuda/kernels/launch.cuh"
#include "cuda/kernels/scales.cuh"
#include "cuda/kernels/skinny.cuh"
#include "cuda/kernels/widen.cuh"
#include "cuda/kernels/with_type.h"

namespace sq {
namespace {

constexpr int kGroupThreads = 256;

// Blocks for groups of `count` values: enough to fill any GPU; the threads step over the rest.
int64_t group_blocks(int64_t count) {
  constexpr int64_t kMostBlocks = 8192, kValues = kGroupThreads * kGroup;
  const int64_t needed = (count + kValues - 1) / kValues;
  return needed < kMostBlocks ? needed : kMostBlocks;
}

template <typename Sum, int kRows>
void launch_skinny(const SkinnyJob& job, void* stream) {
  const auto column_blocks = static_cast<unsigned>((job.epilogue.n + kSkinnyColumns - 1) / kSkinnyColumns);
  const auto row_blocks = static_cast<unsigned>((job.epilogue.m + kRows - 1) / kRows);
  launch(skinny_gemm_kernel<Sum, kRows, kSkinnyColumns>, int64_t{column_blocks} * row_blocks, skinny_threads(job.k), 0,
         stream, job, column_blocks, can_move_words(job.a, job.b, job.k));
}

template <typename Sum>
void launch_skinny(const SkinnyJob& job, void* stream) {
  if (job.epilogue.m == 1) return launch_skinny<Sum, 1>(job, stream);
  if (job.epilogue.m == 2) return launch_skinny<Sum, 2>(job, stream);
  if (job.epilogue.m <= 4) return launch_skinny<Sum, 4>(job, stream);
  launch_skinny<Sum, kSkinnyRows>(job, stream);
}

template <typename Sum>
void launch_epilogue_of(const EpilogueJob& job, void* stream) {
  with_float_type(job.epilogue.y_dtype, [&](auto type) {
    using Y = typename decltype(type)::type;
    const auto* sums = static_cast<const Sum*>(job.sums);
    const bool wide = job.epilogue.n % kEpilogueColumns == 0 &&
                      reinterpret_cast<uintptr_t>(job.sums) % alignof(Four<Sum>) == 0 &&
                      reinterpret_cast<uintptr_t>(job.epilogue.y) % alignof(Four<Y>) == 0;
    const auto row_blocks = static_cast<unsigned>(epilogue_blocks(job.epilogue.n));
    launch(epilogue_kernel<Sum, Y>, job.epilogue.m * row_blocks, kEpilogueThreads, 0, stream, sums, job.splits,
           job.epilogue, row_blocks, wide);
  });
}

}  // namespace

void launch_skinny_gemm(const SkinnyJob& job, void* stream) {
  if (job.epilogue.m == 0 || job.epilogue.n == 0) return;
  job.a_dtype == DType::kInt8 ? launch_skinny<int32_t>(job, stream) : launch_skinny<float>(job, stream);
}

void launch_epilogue(const EpilogueJob& job, void* stream) {
  if (job.epilogue.m == 0 || job.epilogue.n == 0) return;
  job.is_int32 ? launch_epilogue_of<int32_t>(job, stream) : launch_epilogue_of<float>(job, stream);
}

void launch_widen(const WidenJob& job, void* stream) {
  if (job.count == 0) return;
  const bool is_aligned = is_group_aligned(job.q) && is_group_aligned(job.wide);
  launch(widen_kernel, group_blocks(job.count), kGroupThreads, 0, stream, job.q, job.dtype, job.wide, job.count,
         is_aligned);
}

void launch_add_residual(const Epilogue& epilogue, void* stream) {
  const int64_t count = epilogue.m * epilogue.n;
  if (epilogue.residual == nullptr || count == 0) return;
  with_float_type(epilogue.y_dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    T* y = static_cast<T*>(epilogue.y);
    const T* residual = static_cast<const T*>(epilogue.residual);
    const bool wide = is_group_aligned(y) && is_group_aligned(residual);
    launch(add_kernel<T>, group_blocks(count), kGroupThreads, 0, stream, y, residual, count, wide);
  });
}

void launch_align_scales(const ScalesJob& job, void* stream) {
  constexpr int64_t kMostBlocks = 1024;
  const int64_t most = job.m > job.n ? job.m : job.n;
  const int64_t needed = (most + kScalesThreads - 1) / kScalesThreads;
  if (needed == 0) return;
  launch(align_scales_kernel, needed < kMostBlocks ? needed : kMostBlocks, kScalesThreads, 0, stream, job);
}

}  // namespace sq
