// cuBLASLt's descriptors, its handles (one a device), and the algorithms that it chose, remembered by product.
#include "cuda/compute/cublaslt.h"

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <type_traits>
#include <utility>

#include "cuda/compute/algorithm_cache.h"
#include "cuda/compute/cublaslt_library.h"
#include "cuda/compute/devices.h"

namespace sq {
namespace {

void check(const char* op, cublasStatus_t status) {
  SQ_CHECK(status == CUBLAS_STATUS_SUCCESS, op, ": cuBLASLt: ", cublasLtGetStatusString(status));
}

// The library cannot compute this, here or in this version; anything else that is not success is an error.
bool is_refusal(cublasStatus_t status) {
  return status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_ARCH_MISMATCH;
}

// The answer to a description that it does not know, too.
bool is_unknown(cublasStatus_t status) { return is_refusal(status) || status == CUBLAS_STATUS_INVALID_VALUE; }

template <auto kDestroy>
struct Destroyer {
  template <class T>
  void operator()(T* object) const {
    (*kDestroy)(object);
  }
};
// Made by the library and not in place: their size may be another in the version that torch loads.
using Layout = std::unique_ptr<std::remove_pointer_t<cublasLtMatrixLayout_t>, Destroyer<&cublasLtMatrixLayoutDestroy>>;
using Description = std::unique_ptr<std::remove_pointer_t<cublasLtMatmulDesc_t>, Destroyer<&cublasLtMatmulDescDestroy>>;
using Preference =
    std::unique_ptr<std::remove_pointer_t<cublasLtMatmulPreference_t>, Destroyer<&cublasLtMatmulPreferenceDestroy>>;

cudaDataType_t data_type(LtType type) {
  switch (type) {
    case LtType::kInt8:
      return CUDA_R_8I;
    case LtType::kInt32:
      return CUDA_R_32I;
    case LtType::kFloat8E4M3:
      return CUDA_R_8F_E4M3;
    case LtType::kFloat8E5M2:
      return CUDA_R_8F_E5M2;
    case LtType::kBFloat16:
      return CUDA_R_16BF;
    case LtType::kFloat16:
      return CUDA_R_16F;
    default:
      return CUDA_R_32F;
  }
}

Layout layout(const char* op, LtType type, int64_t rows, int64_t columns) {
  cublasLtMatrixLayout_t made = nullptr;
  check(op, cublasLtMatrixLayoutCreate(&made, data_type(type), static_cast<uint64_t>(rows),
                                       static_cast<uint64_t>(columns), rows));
  return Layout(made);
}

template <class T>
void set(const char* op, const Description& description, cublasLtMatmulDescAttributes_t attribute, const T& value) {
  check(op, cublasLtMatmulDescSetAttribute(description.get(), attribute, &value, sizeof value));
}

// False if this version of the library knows no outer scales.
bool set_outer_scales(const char* op, const Description& description, const LtOperands& operands) {
  if (!lt_knows_outer_scales()) return false;
  set(op, description, kLtAScaleMode, kLtOuterScales);
  set(op, description, kLtBScaleMode, kLtOuterScales);
  set(op, description, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, static_cast<const void*>(operands.a_scale));
  set(op, description, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, static_cast<const void*>(operands.b_scale));
  return true;
}

// Null if this version of the library knows no such products.
Description describe(const char* op, const LtProduct& product, const LtOperands& operands) {
  const bool is_int8 = product.a == LtType::kInt8;
  cublasLtMatmulDesc_t made = nullptr;
  check(op, cublasLtMatmulDescCreate(&made, is_int8 ? CUBLAS_COMPUTE_32I : CUBLAS_COMPUTE_32F,
                                     is_int8 ? CUDA_R_32I : CUDA_R_32F));
  Description description(made);
  set(op, description, CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T);
  set(op, description, CUBLASLT_MATMUL_DESC_TRANSB, CUBLAS_OP_N);
  if (product.has_outer_scales && !set_outer_scales(op, description, operands)) return nullptr;
  if (product.is_fast) set(op, description, CUBLASLT_MATMUL_DESC_FAST_ACCUM, int8_t{1});
  if (product.has_bias) {
    set(op, description, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    set(op, description, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, static_cast<int32_t>(data_type(product.d)));
    set(op, description, CUBLASLT_MATMUL_DESC_BIAS_POINTER, operands.bias);
  }
  return description;
}

// One handle a device, made when it is first needed and never destroyed: at exit the driver may be gone before us. A
// handle serves any number of threads and streams.
cublasLtHandle_t handle(const char* op, int device) {
  static std::mutex mutex;
  static std::map<int, cublasLtHandle_t> handles;
  const std::lock_guard<std::mutex> lock(mutex);
  cublasLtHandle_t& own = handles[device];
  if (own == nullptr) check(op, cublasLtCreate(&own));
  return own;
}

struct Algorithm {
  cublasLtMatmulAlgo_t algorithm;
  size_t workspace_bytes;
};

struct Choice {
  Layout a, b, d;
  Description description;
};

std::optional<Algorithm> ask(const char* op, cublasLtHandle_t own, const Choice& choice, int arch) {
  cublasLtMatmulPreference_t made = nullptr;
  check(op, cublasLtMatmulPreferenceCreate(&made));
  const Preference preference(made);
  const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
    check(op, cublasLtMatmulPreferenceSetAttribute(preference.get(), attribute, &value, sizeof value));
  };
  prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(lt_workspace_bytes(arch)));
  const uint32_t alignment = 16;  // the plan's promise; the default would be 256
  for (const auto attribute :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    prefer(attribute, alignment);
  }
  cublasLtMatmulHeuristicResult_t result{};
  int found = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(own, choice.description.get(), choice.a.get(), choice.b.get(), choice.d.get(),
                                     choice.d.get(), preference.get(), 1, &result, &found);
  if (is_unknown(status)) return std::nullopt;
  check(op, status);
  if (found == 0 || result.state != CUBLAS_STATUS_SUCCESS) return std::nullopt;
  return Algorithm{result.algo, result.workspaceSize};
}

using KnownAlgorithms = AlgorithmCache<std::pair<int, LtProduct>, Algorithm>;

}  // namespace

bool lt_multiply(const char* op, const LtProduct& product, const LtOperands& operands, const Tensor& like) {
  static KnownAlgorithms known;
  const int device = like.get_device_index();
  const cublasLtHandle_t own = handle(op, device);
  const Choice choice{layout(op, product.a, product.depth, product.rows),
                      layout(op, product.b, product.depth, product.columns),
                      layout(op, product.d, product.rows, product.columns), describe(op, product, operands)};
  if (choice.description == nullptr) return false;
  const int32_t one_int = 1, zero_int = 0;
  const float one = 1.0f, zero = 0.0f;
  const bool is_int8 = product.a == LtType::kInt8;
  const void* alpha = is_int8 ? static_cast<const void*>(&one_int) : &one;
  const void* beta = is_int8 ? static_cast<const void*>(&zero_int) : &zero;
  const auto multiply = [&](const Algorithm& algorithm) {
    Tensor workspace = empty_like_device(like, {static_cast<int64_t>(algorithm.workspace_bytes)}, ScalarType::Byte);
    const cublasStatus_t status = cublasLtMatmul(
        own, choice.description.get(), alpha, operands.a, choice.a.get(), operands.b, choice.b.get(), beta, operands.d,
        choice.d.get(), operands.d, choice.d.get(), &algorithm.algorithm, workspace.mutable_data_ptr(),
        algorithm.workspace_bytes, static_cast<cudaStream_t>(current_stream(like)));
    if (is_refusal(status)) return false;  // which the heuristic did not know
    check(op, status);
    return true;
  };
  return known.run({device, product}, [&] { return ask(op, own, choice, device_arch(device)); }, multiply);
}

void lt_warm_up(const char* op, int device) { handle(op, device); }

}  // namespace sq
