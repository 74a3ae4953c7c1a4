// cuTensorMapEncodeTiled, asked of the driver that is there: nothing is linked with libcuda, which machines without a GPU
// do not have.
#include "cuda/compute/tensor_map.h"

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <tuple>

#include "common/checks.h"
#include "cuda/kernels/tile_maps.h"

namespace sq {
namespace {

static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && alignof(TensorMap) >= alignof(CUtensorMap));

PFN_cuTensorMapEncodeTiled_v12000 find_encode(const char* op) {
  constexpr const char* kName = "cuTensorMapEncodeTiled";
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
  constexpr unsigned kSince = 12000;  // CUDA 12.0 brought it
  const cudaError_t error = cudaGetDriverEntryPointByVersion(kName, &found, kSince, cudaEnableDefault, &result);
#else  // this one takes what is as old as the toolkit, newer toolkits will not have it
  const cudaError_t error = cudaGetDriverEntryPoint(kName, &found, cudaEnableDefault, &result);
#endif
  SQ_CHECK(error == cudaSuccess && result == cudaDriverEntryPointSuccess && found != nullptr, op,
           ": the NVIDIA driver has no cuTensorMapEncodeTiled, which wgmma needs; update it");
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
}

TensorMap encode_rows(const char* op, const uint8_t* data, int64_t rows, int64_t k, int box_rows) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = find_encode(op);
  static_assert(WgmmaTile::kK == SwapTile::kK);
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(k), static_cast<cuuint64_t>(rows)};  // the innermost comes first
  const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(k)};
  const cuuint32_t box[] = {WgmmaTile::kK, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  TensorMap map;
  const CUresult result =
      encode(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<uint8_t*>(data), sizes,
             row_bytes, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  SQ_CHECK(result == CUDA_SUCCESS, op, ": the driver makes no tensor map of ", rows, " rows of ", k, " bytes (error ",
           static_cast<int>(result), ")");
  return map;
}

}  // namespace

// A map says where a matrix is and not what is there: memory that was freed and holds another matrix of the same shape has
// the same map. Those of a model's weights are all kept.
TensorMap map_of_rows(const char* op, const uint8_t* data, int64_t rows, int64_t k, int box_rows) {
  constexpr size_t kMost = 4096;
  static std::mutex mutex;
  static std::map<std::tuple<const uint8_t*, int64_t, int64_t, int>, TensorMap> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::tuple key(data, rows, k, box_rows);
  if (const auto found = known.find(key); found != known.end()) return found->second;
  if (known.size() >= kMost) known.clear();
  return known[key] = encode_rows(op, data, rows, k, box_rows);
}

}  // namespace sq
