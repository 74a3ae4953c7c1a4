// Hands cuBLASLt every kind of description that csrc/cuda/compute/cublaslt.cpp makes, and reads it back: the library checks the
// size and the value of each attribute, and needs no GPU for that. Compiled and run by tests/packaging/test_cuda_build.py.
#include "cuda/compute/cublaslt.cpp"

#include <cstdio>
#include <cstdlib>

// What only a product that runs would need.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**) { return 0; }

namespace sq {

int device_arch(int) { return 90; }

SQ_LT_FUNCTION(cublasLtMatmulDescGetAttribute);
SQ_LT_FUNCTION(cublasLtMatrixLayoutGetAttribute);

namespace {

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
  EXPECT((description == nullptr) == (product.has_outer_scales && !lt_knows_outer_scales()));
  if (description == nullptr) return;  // an older library cannot, and that is no error
  EXPECT(attribute<int32_t>(description, CUBLASLT_MATMUL_DESC_TRANSA) == CUBLAS_OP_T);
  EXPECT(attribute<int32_t>(description, CUBLASLT_MATMUL_DESC_TRANSB) == CUBLAS_OP_N);
  EXPECT(attribute<int32_t>(description, CUBLASLT_MATMUL_DESC_COMPUTE_TYPE) == compute);
  EXPECT((attribute<int8_t>(description, CUBLASLT_MATMUL_DESC_FAST_ACCUM) != 0) == product.is_fast);
  if (lt_knows_outer_scales()) {
    const int32_t mode = attribute<int32_t>(description, kLtAScaleMode);
    EXPECT(mode == (product.has_outer_scales ? kLtOuterScales : 0));
    EXPECT(attribute<int32_t>(description, kLtBScaleMode) == mode);
  }
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

void test_all() {
  GemmProblem problem{};
  problem.arch = 90;
  problem.m = 100;
  problem.n = 4096;
  problem.k = 512;
  problem.a = problem.b = DType::kInt8;
  problem.y = problem.bias = DType::kBFloat16;
  problem.is_aligned = problem.is_bias_aligned = true;
  problem.l2_bytes = int64_t{50} << 20;
  test(problem, CUBLAS_COMPUTE_32I, CUDA_R_32I);
  problem.a = DType::kFloat8E4M3;
  problem.b = DType::kFloat8E5M2;
  test(problem, CUBLAS_COMPUTE_32F, CUDA_R_16BF);
  problem.is_fast = true;
  test(problem, CUBLAS_COMPUTE_32F, CUDA_R_16BF);
  problem.has_bias = true;
  test(problem, CUBLAS_COMPUTE_32F, CUDA_R_16BF);
  problem.y = problem.bias = DType::kFloat16;
  test(problem, CUBLAS_COMPUTE_32F, CUDA_R_16F);
  problem.arch = 100;
  test(problem, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  problem.arch = 80;
  test(problem, CUBLAS_COMPUTE_32F, CUDA_R_32F);
  std::printf("cuBLASLt %zu\n", cublasLtGetVersion());
}

}  // namespace
}  // namespace sq

int main() { sq::test_all(); }
