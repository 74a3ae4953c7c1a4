// Hands cuBLASLt every kind of description that csrc/cuda/compute/cublaslt.cpp makes, and reads it back: the library checks the
// size and the value of each attribute, and needs no GPU for that. Compiled and run by tests/test_cuda_build.py.
#include "cuda/compute/cublaslt.cpp"

#include <cstdio>
#include <cstdlib>

// What only a product that runs would need.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**) { return 0; }
namespace sq {
int device_arch(int) { return 90; }
}  // namespace sq

namespace {

using namespace sq;

#define EXPECT(condition)                                                  \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

template <class T>
T attribute(const Description& description, cublasLtMatmulDescAttributes_t which) {
  T value{};
  size_t written = 0;
  EXPECT(cublasLtMatmulDescGetAttribute(description.get(), which, &value, sizeof value, &written) ==
         CUBLAS_STATUS_SUCCESS);
  EXPECT(written == sizeof value);
  return value;
}

int64_t leading_dimension(const Layout& layout) {
  int64_t value = 0;
  size_t written = 0;
  EXPECT(cublasLtMatrixLayoutGetAttribute(layout.get(), CUBLASLT_MATRIX_LAYOUT_LD, &value, sizeof value, &written) ==
         CUBLAS_STATUS_SUCCESS);
  return value;
}

void test(const GemmProblem& problem, cublasComputeType_t compute, cudaDataType_t result) {
  const LtProduct product = plan_gemm(problem).product;
  const float scale = 1.0f;
  const LtOperands operands{nullptr, nullptr, &scale, &scale, &scale, nullptr};
  const Description description = describe("test", product, operands);
  EXPECT(attribute<int32_t>(description, CUBLASLT_MATMUL_DESC_TRANSA) == CUBLAS_OP_T);
  EXPECT(attribute<int32_t>(description, CUBLASLT_MATMUL_DESC_TRANSB) == CUBLAS_OP_N);
  EXPECT(attribute<int32_t>(description, CUBLASLT_MATMUL_DESC_COMPUTE_TYPE) == compute);
  EXPECT(attribute<int8_t>(description, CUBLASLT_MATMUL_DESC_FAST_ACCUM) == (product.is_fast ? 1 : 0));
  const int32_t mode = attribute<int32_t>(description, CUBLASLT_MATMUL_DESC_A_SCALE_MODE);
  EXPECT(mode == (product.has_outer_scales ? CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F : 0));
  EXPECT(attribute<int32_t>(description, CUBLASLT_MATMUL_DESC_B_SCALE_MODE) == mode);
  EXPECT((attribute<const void*>(description, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER) != nullptr) ==
         product.has_outer_scales);
  EXPECT((attribute<uint32_t>(description, CUBLASLT_MATMUL_DESC_EPILOGUE) == CUBLASLT_EPILOGUE_BIAS) ==
         product.has_bias);
  EXPECT((attribute<const void*>(description, CUBLASLT_MATMUL_DESC_BIAS_POINTER) != nullptr) == product.has_bias);
  if (product.has_bias) EXPECT(attribute<int32_t>(description, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE) == result);
  EXPECT(leading_dimension(layout("test", product.a, product.depth, product.rows)) == problem.k);
  EXPECT(leading_dimension(layout("test", product.b, product.depth, product.columns)) == problem.k);
  const Layout d = layout("test", product.d, product.rows, product.columns);
  EXPECT(leading_dimension(d) == problem.n);
  uint32_t type = 0;
  size_t written = 0;
  EXPECT(cublasLtMatrixLayoutGetAttribute(d.get(), CUBLASLT_MATRIX_LAYOUT_TYPE, &type, sizeof type, &written) ==
         CUBLAS_STATUS_SUCCESS);
  EXPECT(type == static_cast<uint32_t>(result));
}

}  // namespace

int main() {
  GemmProblem problem{90,
                      100,
                      4096,
                      512,
                      DType::kInt8,
                      DType::kInt8,
                      DType::kBFloat16,
                      true,
                      true,
                      false,
                      DType::kBFloat16,
                      false,
                      int64_t{50} << 20};
  test(problem, CUBLAS_COMPUTE_32I, CUDA_R_32I);
  problem.a = DType::kFloat8E4M3;
  problem.b = DType::kFloat8E5M2;
  test(problem, CUBLAS_COMPUTE_32F, CUDA_R_16BF);
  problem.has_bias = true;
  test(problem, CUBLAS_COMPUTE_32F, CUDA_R_16BF);
  problem.y = problem.bias = DType::kFloat16;
  test(problem, CUBLAS_COMPUTE_32F, CUDA_R_16F);
  problem.is_fast = true;
  test(problem, CUBLAS_COMPUTE_32F, CUDA_R_16F);
  problem.arch = 100;
  test(problem, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  problem.is_fast = false;
  problem.arch = 80;
  test(problem, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  std::printf("cuBLASLt %zu\n", cublasLtGetVersion());
}
