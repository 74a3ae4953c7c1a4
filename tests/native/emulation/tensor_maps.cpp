// Hands csrc/cuda/compute/tensor_map.cpp a driver that insists on what the documents of cuTensorMapEncodeTiled ask for, and reads
// what it was given. Compiled and run by tests/packaging/test_cuda_build.py, against the toolkit's own headers.
#include "cuda/compute/tensor_map.cpp"

#include <cstdio>
#include <cstdlib>
#include <string>

namespace {

#define EXPECT(condition)                                                  \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

bool has_entry_point = false;
int encoded = 0;
CUresult answer = CUDA_SUCCESS;
struct {
  const void* data;
  uint64_t k, rows, row_bytes;
  uint32_t box_k, box_rows;
} seen;

template <typename T>
bool is_aligned(const T* pointer, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

CUresult encode(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* sizes,
                const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* steps,
                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                CUtensorMapFloatOOBfill fill) {
  constexpr uint64_t kMostSize = uint64_t{1} << 32, kMostStride = uint64_t{1} << 40;
  EXPECT(is_aligned(map, 64) && is_aligned(static_cast<char*>(data), 16));
  EXPECT(type == CU_TENSOR_MAP_DATA_TYPE_UINT8 && rank == 2);
  EXPECT(interleave == CU_TENSOR_MAP_INTERLEAVE_NONE && swizzle == CU_TENSOR_MAP_SWIZZLE_128B);
  EXPECT(fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);  // zeros
  EXPECT(strides[0] % 16 == 0 && strides[0] < kMostStride && strides[0] >= sizes[0]);
  for (int i = 0; i < 2; ++i) {
    EXPECT(sizes[i] > 0 && sizes[i] <= kMostSize);
    EXPECT(box[i] > 0 && box[i] <= 256 && steps[i] == 1);
  }
  EXPECT(box[0] % 16 == 0 && box[0] <= 128);  // the span of the swizzle
  ++encoded;
  seen = {data, sizes[0], sizes[1], strides[0], box[0], box[1]};
  return answer;
}

std::string failure(const uint8_t* data) {
  try {
    sq::map_of_rows("w8a8_gemm", data, 5, 48, 64);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

}  // namespace

#if CUDART_VERSION >= 12050
extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                                        unsigned long long, cudaDriverEntryPointQueryResult* result) {
  EXPECT(version == 12000);
#else
extern "C" cudaError_t cudaGetDriverEntryPoint(const char* name, void** function, unsigned long long,
                                               cudaDriverEntryPointQueryResult* result) {
#endif
  EXPECT(name == std::string("cuTensorMapEncodeTiled"));
  *function = has_entry_point ? reinterpret_cast<void*>(&encode) : nullptr;
  *result = has_entry_point ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

int main() {
  alignas(16) static uint8_t data[32];
  EXPECT(failure(data) == "w8a8_gemm: the NVIDIA driver has no cuTensorMapEncodeTiled, which wgmma needs; update it");
  has_entry_point = true;
  for (int64_t rows : {int64_t{1}, int64_t{100}, (int64_t{1} << 31) - 1}) {
    for (int64_t k : {16, 48, 128, 14336}) {
      for (int box_rows : {sq::WgmmaTile::kM, sq::SwapTile::kM}) {
        sq::map_of_rows("w8a8_gemm", data, rows, k, box_rows);
        EXPECT(seen.data == data && seen.k == static_cast<uint64_t>(k) && seen.rows == static_cast<uint64_t>(rows));
        EXPECT(seen.row_bytes == static_cast<uint64_t>(k));
        EXPECT(seen.box_k == sq::WgmmaTile::kK && seen.box_rows == static_cast<uint32_t>(box_rows));
      }
    }
  }
  // Every one was made once; of another place, another is made.
  EXPECT(encoded == 3 * 4 * 2);
  sq::map_of_rows("w8a8_gemm", data, 100, 48, sq::SwapTile::kM);
  EXPECT(encoded == 3 * 4 * 2);
  sq::map_of_rows("w8a8_gemm", data + 16, 100, 48, sq::SwapTile::kM);
  EXPECT(encoded == 3 * 4 * 2 + 1 && seen.data == data + 16);
  answer = CUDA_ERROR_INVALID_VALUE;
  EXPECT(failure(data) == "w8a8_gemm: the driver makes no tensor map of 5 rows of 48 bytes (error 1)");
  std::printf("tensor maps are right\n");
}
