// cuBLASLt's functions, looked up in the copy that torch uses: no version of the library is linked with. Include this and
// not <cublasLt.h>.
#pragma once

#include <cublasLt.h>

#include <atomic>

namespace sq {

// The address of a function of cuBLASLt. Fails with a sentence that names the library.
void* find_lt_function(const char* name);

// A function of cuBLASLt, looked up at its first call.
template <class Signature>
class LtFunction;

template <class Result, class... Arguments>
class LtFunction<Result(Arguments...)> {
 public:
  explicit constexpr LtFunction(const char* name) : name_(name) {}

  Result operator()(Arguments... arguments) const {
    Function function = found_.load(std::memory_order_relaxed);
    if (function == nullptr) {
      function = reinterpret_cast<Function>(find_lt_function(name_));
      found_.store(function, std::memory_order_relaxed);
    }
    return function(arguments...);
  }

 private:
  using Function = Result (*)(Arguments...);

  const char* name_;
  mutable std::atomic<Function> found_{nullptr};
};

// Within this namespace a call finds these objects. C++ then leaves the header's functions, which have the same names, alone:
// it looks for functions beside the types of the arguments only where the name is not an object's.
#define SQ_LT_FUNCTION(name) inline const LtFunction<decltype(::name)> name(#name)
SQ_LT_FUNCTION(cublasLtCreate);
SQ_LT_FUNCTION(cublasLtGetStatusString);
SQ_LT_FUNCTION(cublasLtGetVersion);
SQ_LT_FUNCTION(cublasLtMatmul);
SQ_LT_FUNCTION(cublasLtMatmulAlgoGetHeuristic);
SQ_LT_FUNCTION(cublasLtMatmulDescCreate);
SQ_LT_FUNCTION(cublasLtMatmulDescDestroy);
SQ_LT_FUNCTION(cublasLtMatmulDescSetAttribute);
SQ_LT_FUNCTION(cublasLtMatmulPreferenceCreate);
SQ_LT_FUNCTION(cublasLtMatmulPreferenceDestroy);
SQ_LT_FUNCTION(cublasLtMatmulPreferenceSetAttribute);
SQ_LT_FUNCTION(cublasLtMatrixLayoutCreate);
SQ_LT_FUNCTION(cublasLtMatrixLayoutDestroy);

// What the header of CUDA 12.4 does not have yet: values of cuBLAS 12.8's and, for the last, 12.9's.
inline const auto kLtAScaleMode = static_cast<cublasLtMatmulDescAttributes_t>(31);
inline const auto kLtBScaleMode = static_cast<cublasLtMatmulDescAttributes_t>(32);
constexpr int32_t kLtOuterScales = 3;
constexpr size_t kLtOuterScalesSince = 120900;
#if CUBLAS_VERSION >= 120900
static_assert(CUBLASLT_MATMUL_DESC_A_SCALE_MODE == 31 && CUBLASLT_MATMUL_DESC_B_SCALE_MODE == 32 &&
              CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F == kLtOuterScales);
#endif

// Whether the library knows scales by row and column; whether the GPU does is another question.
inline bool lt_knows_outer_scales() { return cublasLtGetVersion() >= kLtOuterScalesSince; }

}  // namespace sq
