// From a family of kernels to the launch: configuration, kernel.
#include "cuda/compute/tile_product.h"

#include "cuda/compute/devices.h"
#include "cuda/compute/tensor_map.h"

namespace sq {
namespace {

void multiply_by_wgmma(const char* op, const TileJob& job, const GemmChoice& choice, int multiprocessors,
                       const Tensor& like) {
  const Epilogue& epilogue = job.epilogue;
  WgmmaJob wgmma{};
  wgmma.product = job;
  wgmma.is_swapped = choice.config->kernel == GemmKernel::kSwapped;
  wgmma.a_map = map_of_rows(op, job.a, epilogue.m, job.k, choice.config->tile_m);
  wgmma.b_map = map_of_rows(op, job.b, epilogue.n, job.k, choice.config->tile_n);
  wgmma.multiprocessors = multiprocessors;
  wgmma.splits = choice.splits;
  if (!wgmma.is_swapped) return launch_wgmma_gemm(wgmma, current_stream(like));
  const bool is_int32 = job.a_dtype == DType::kInt8;
  Tensor sums =
      empty_like_device(like, {choice.splits, epilogue.m, epilogue.n}, is_int32 ? ScalarType::Int : ScalarType::Float);
  wgmma.parts = sums.mutable_data_ptr();
  launch_wgmma_gemm(wgmma, current_stream(like));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  launch_epilogue({wgmma.parts, choice.splits, is_int32, epilogue}, current_stream(like));
}

}  // namespace

TileProblem problem_of_device(int device) {
  const CodeArch code = device_code(device);
  TileProblem problem{};
  problem.arch = device_arch(device);
  problem.code_arch = code.arch;
  problem.is_arch_specific = code.is_specific;
  problem.multiprocessors = multiprocessors(device);
  return problem;
}

Refusal multiply_by_tiles(ProductJob& job, const Rows& rows, GemmFamily family) {
  TileJob part = job.of_rows(rows);
  const Epilogue whole = part.epilogue;
  part.epilogue.residual = nullptr;  // the tile kernels know of none
  TileProblem problem = problem_of_device(job.device());
  problem.m = part.epilogue.m;
  problem.n = part.epilogue.n;
  problem.k = part.k;
  problem.a = part.a_dtype;
  problem.b = part.b_dtype;
  problem.y_bytes = static_cast<int>(element_size(part.epilogue.y_dtype));
  problem.is_aligned = is_aligned(part.a) && is_aligned(part.b);
  const GemmChoice choice = choose_config(problem, family);
  if (choice.config == nullptr) return {{rows}, choice.reason};
  switch (choice.config->family) {
    case GemmFamily::kMma:
      launch_mma_gemm(part, current_stream(job.a));
      break;
    case GemmFamily::kWgmma:
      multiply_by_wgmma(job.op, part, choice, problem.multiprocessors, job.a);
      break;
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  add_residual(whole, job.a);
  return {};
}

}  // namespace sq
