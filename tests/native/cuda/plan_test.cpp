// The choice of how a GPU multiplies: for every shape near a boundary, dtype and architecture, the path is one that its
// library takes, the fields of the product are those of the layout, and no shape goes without.
#include "cuda/compute/gemm_plan.h"

#include "native/testing.h"

namespace {

using namespace sq;

constexpr int kArchs[] = {80, 86, 87, 89, 90, 100, 103, 120, 121};
constexpr DType kFloats[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
constexpr DType kPairs[][2] = {{DType::kInt8, DType::kInt8},
                               {DType::kFloat8E4M3, DType::kFloat8E4M3},
                               {DType::kFloat8E4M3, DType::kFloat8E5M2},
                               {DType::kFloat8E5M2, DType::kFloat8E4M3},
                               {DType::kFloat8E5M2, DType::kFloat8E5M2}};

// A product of bf16 rows with per-row and per-column scales, on an H100.
GemmProblem problem_of(DType a, DType b, int64_t m, int64_t n, int64_t k) {
  return {90, m, n, k, a, b, DType::kBFloat16, true, true, true, true, false, DType::kFloat32};
}

void check_plan(const GemmProblem& problem) {
  const GemmPlan plan = plan_gemm(problem);
  const LtProduct& product = plan.product;
  const bool is_int8 = problem.a == DType::kInt8;
  CHECK(plan.path != GemmPath::kSkinny || plan.rows_together == problem.m, "one launch does all");
  if (plan.path == GemmPath::kSkinny) return;
  CHECK(problem.m > kMostSkinnyRows && problem.n > 0 && problem.k > 0, "m %" PRId64, problem.m);
  CHECK(product.rows == problem.n && product.depth == problem.k && product.columns == plan.rows_together, "shape");
  CHECK(plan.rows_together > 0 && plan.rows_together <= problem.m, "%" PRId64, plan.rows_together);
  const int64_t element = plan.path == GemmPath::kWide ? 2 : 1;
  // Every row of the operands begins at a multiple of 16 bytes, if the first does; and of the result.
  CHECK(problem.k * element % 16 == 0, "k %" PRId64, problem.k);
  const int64_t result = product.d == LtType::kFloat32 || product.d == LtType::kInt32 ? 4 : 2;
  CHECK(problem.n * result % 16 == 0, "n %" PRId64, problem.n);
  switch (plan.path) {
    case GemmPath::kInt8:
      CHECK(is_int8 && problem.is_aligned && product.a == LtType::kInt8 && product.d == LtType::kInt32, "int8");
      break;
    case GemmPath::kOuter:
      CHECK(problem.arch == 90 && problem.a_per_row && problem.b_per_column && problem.are_vectors_aligned &&
                product.has_outer_scales,
            "outer");
      CHECK(product.d == lt_type(problem.y) && product.has_bias == problem.has_bias, "outer result");
      CHECK(!problem.has_bias || problem.bias == problem.y, "outer bias");
      CHECK(plan.rows_together == problem.m, "no sums are kept");
      [[fallthrough]];
    case GemmPath::kFp8:
      CHECK(!is_int8 && problem.arch >= 89 && problem.is_aligned && problem.n % 16 == 0, "fp8");
      CHECK(product.a == lt_type(problem.b) && product.b == lt_type(problem.a), "the weight comes first");
      CHECK(product.a != LtType::kFloat8E5M2 || product.b != LtType::kFloat8E5M2, "cuBLASLt lacks e5m2 x e5m2");
      break;
    case GemmPath::kWide:
      CHECK(!is_int8 && product.a == LtType::kBFloat16 && product.b == LtType::kBFloat16, "bf16");
      break;
    default:
      break;
  }
  if (plan.path != GemmPath::kOuter) {
    CHECK(!product.has_outer_scales && !product.has_bias, "the epilogue has them");
    CHECK(plan.rows_together * problem.n * 4 <= kMostSumBytes || plan.rows_together <= 256, "workspace");
  }
}

GemmPath path_of(const GemmProblem& problem) { return plan_gemm(problem).path; }

void test_choices() {
  constexpr DType kE4M3 = DType::kFloat8E4M3, kE5M2 = DType::kFloat8E5M2, kInt8 = DType::kInt8;
  CHECK(path_of(problem_of(kInt8, kInt8, 8, 4096, 4096)) == GemmPath::kSkinny, "few rows");
  CHECK(path_of(problem_of(kInt8, kInt8, 9, 4096, 4096)) == GemmPath::kInt8, "more rows");
  CHECK(path_of(problem_of(kInt8, kInt8, 100, 4095, 4096)) == GemmPath::kSkinny, "odd n");
  CHECK(path_of(problem_of(kInt8, kInt8, 100, 4096, 4100)) == GemmPath::kSkinny, "odd k");
  CHECK(path_of(problem_of(kInt8, kInt8, 100, 4096, 0)) == GemmPath::kSkinny, "no k");
  CHECK(path_of(problem_of(kE4M3, kE4M3, 100, 4096, 4096)) == GemmPath::kOuter, "Hopper scales");
  CHECK(path_of(problem_of(kE5M2, kE4M3, 100, 4096, 4096)) == GemmPath::kOuter, "mixed");
  CHECK(path_of(problem_of(kE5M2, kE5M2, 100, 4096, 4096)) == GemmPath::kWide, "what cuBLASLt lacks");
  CHECK(path_of(problem_of(kE5M2, kE5M2, 100, 4096, 4095)) == GemmPath::kSkinny, "and odd");
  GemmProblem problem = problem_of(kE4M3, kE4M3, 100, 4096, 4096);
  problem.a_per_row = false;
  CHECK(path_of(problem) == GemmPath::kFp8, "one scale for all rows");
  problem.a_per_row = true;
  problem.are_vectors_aligned = false;
  CHECK(path_of(problem) == GemmPath::kFp8, "scales in the middle of others");
  problem.are_vectors_aligned = true;
  problem.has_bias = true;
  CHECK(path_of(problem) == GemmPath::kFp8, "a bias of another type");
  problem.bias = DType::kBFloat16;
  CHECK(path_of(problem) == GemmPath::kOuter, "a bias of the same type");
  problem.y = problem.bias = DType::kFloat32;
  CHECK(path_of(problem) == GemmPath::kFp8, "cuBLASLt adds no fp32 bias");
  for (int arch : {89, 100, 120}) {
    problem.arch = arch;
    CHECK(path_of(problem) == GemmPath::kFp8, "sm_%d", arch);
  }
  for (int arch : {80, 86}) {
    problem.arch = arch;
    CHECK(path_of(problem) == GemmPath::kWide, "sm_%d", arch);
    problem.is_aligned = false;  // of the 8-bit operands, which are widened into aligned memory
    CHECK(path_of(problem) == GemmPath::kWide, "sm_%d", arch);
    problem.is_aligned = true;
  }
}

void test_refusals() {
  constexpr DType kE4M3 = DType::kFloat8E4M3;
  for (DType b : {kE4M3, DType::kFloat8E5M2}) {
    const GemmProblem problem = problem_of(kE4M3, b, 100, 4096, 4096);
    const GemmPlan outer = plan_gemm(problem), plain = plan_without_algorithm(problem, outer);
    CHECK(outer.path == GemmPath::kOuter && plain.path == GemmPath::kFp8, "scales in the epilogue");
    CHECK(!plain.product.has_outer_scales && plain.product.d == LtType::kFloat32, "of fp32 sums");
    CHECK(plan_without_algorithm(problem, plain).path == GemmPath::kSkinny, "and without the library");
  }
  const GemmProblem problem = problem_of(DType::kInt8, DType::kInt8, 100, 4096, 4096);
  const GemmPlan last = plan_without_algorithm(problem, plan_gemm(problem));
  CHECK(last.path == GemmPath::kSkinny && last.rows_together == 100, "INT8 too");
}

void test_rows_together() {
  // Llama-3-8B's gate projection for 8192 tokens: 450 MiB of sums, in pieces of 256 MiB.
  const GemmPlan plan = plan_gemm(problem_of(DType::kInt8, DType::kInt8, 8192, 14336, 4096));
  CHECK(plan.rows_together == 4608, "%" PRId64, plan.rows_together);
  CHECK(plan_gemm(problem_of(DType::kInt8, DType::kInt8, 4096, 4096, 4096)).rows_together == 4096, "all at once");
  CHECK(plan_gemm(problem_of(DType::kInt8, DType::kInt8, 4096, 1 << 20, 4096)).rows_together == 256, "wide");
}

}  // namespace

int main() {
  for (int arch : kArchs) {
    for (const auto& pair : kPairs) {
      for (int64_t m : {0, 1, 8, 9, 16, 17, 8192, 100000}) {
        for (int64_t n : {0, 1, 4, 8, 12, 16, 24, 576, 4095, 4096, 128256}) {
          for (int64_t k : {0, 1, 4, 8, 16, 24, 32, 577, 4096, 131071}) {
            for (int flags = 0; flags < 32; ++flags) {
              for (int types = 0; types < 9; ++types) {
                check_plan({arch, m, n, k, pair[0], pair[1], kFloats[types % 3], (flags & 1) != 0, (flags & 2) != 0,
                            (flags & 4) != 0, (flags & 8) != 0, (flags & 16) != 0, kFloats[types / 3]});
              }
            }
          }
        }
      }
    }
  }
  test_choices();
  test_refusals();
  test_rows_together();
  // Two products that differ in anything have different places in the memory of choices.
  const LtProduct one{LtType::kInt8, LtType::kInt8, LtType::kInt32, 16, 32, 64, false, false};
  LtProduct other = one;
  CHECK(!(one < other) && !(other < one), "equal");
  other.has_bias = true;
  CHECK(one < other || other < one, "not equal");
}
