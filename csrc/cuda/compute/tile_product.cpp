// From the environment variable to the launch: request, configuration, kernel.
#include "cuda/compute/tile_product.h"

#include <cstdlib>
#include <string>

#include "cuda/compute/devices.h"
#include "cuda/compute/tensor_map.h"

namespace sq {
namespace {

constexpr GemmRequest kRequests[] = {
    {"library", false, std::nullopt},
    {"mma", true, GemmFamily::kMma},
    {"wgmma", true, GemmFamily::kWgmma},
    {"auto", true, std::nullopt},
};

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

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kChunk == 0; }

}  // namespace

GemmRequest requested_gemm(const char* op) {
  const char* value = std::getenv("SMOOTHQUANT_CUDA_GEMM");
  if (value == nullptr || *value == '\0') return kRequests[0];
  for (const GemmRequest& request : kRequests) {
    if (value == std::string(request.name)) return request;
  }
  fail(op, ": SMOOTHQUANT_CUDA_GEMM is '", value, "', expected library, mma, wgmma or auto");
}

void multiply_tiles(const char* op, const GemmRequest& request, const TileJob& job, const Tensor& like) {
  const int device = like.get_device_index();
  const CodeArch code = device_code(device);
  TileProblem problem{};
  problem.m = job.epilogue.m;
  problem.n = job.epilogue.n;
  problem.k = job.k;
  problem.a = job.a_dtype;
  problem.b = job.b_dtype;
  problem.y_bytes = static_cast<int>(element_size(job.epilogue.y_dtype));
  problem.is_aligned = is_aligned(job.a) && is_aligned(job.b);
  problem.arch = device_arch(device);
  problem.code_arch = code.arch;
  problem.is_arch_specific = code.is_specific;
  problem.multiprocessors = multiprocessors(device);
  const GemmChoice choice = choose_config(problem, request.family);
  SQ_CHECK(choice.config != nullptr, op, ": SMOOTHQUANT_CUDA_GEMM is ", request.name, ", but ", choice.reason);
  switch (choice.config->family) {
    case GemmFamily::kMma:
      require_validated(op, Family::kGemmMma, device);
      launch_mma_gemm(job, current_stream(like));
      break;
    case GemmFamily::kWgmma:
      require_validated(op, Family::kGemmWgmma, device);
      multiply_by_wgmma(op, job, choice, problem.multiprocessors, like);
      break;
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace sq
