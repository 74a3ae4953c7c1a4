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

constexpr int64_t kL2Bytes = int64_t{50} << 20;  // of an H100

// A product with a result in bf16 and no bias, on an H100.
GemmProblem problem_of(DType a, DType b, int64_t m, int64_t n, int64_t k) {
  return {90, m, n, k, a, b, DType::kBFloat16, true, true, false, DType::kFloat32, false, kL2Bytes};
}

void check_chunks(const GemmProblem& problem, int64_t chunks) {
  CHECK(chunks > 0, "%" PRId64, chunks);
  int64_t end = 0, least = problem.m, most = 0;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const Rows rows = chunk_rows(problem.m, chunks, chunk);
    CHECK(rows.begin == end && rows.begin % kChunkRows == 0, "the next rows, %" PRId64, rows.begin);
    end = rows.end;
    least = std::min(least, rows.end - rows.begin);
    most = std::max(most, rows.end - rows.begin);
  }
  CHECK(end == problem.m, "all rows, %" PRId64, end);
  CHECK(most - least < 2 * kChunkRows, "%" PRId64 " and %" PRId64 " rows", least, most);
  CHECK(most <= 256 || most * problem.n * 4 <= kMostSumBytes, "workspace");
}

void check_plan(const GemmProblem& problem) {
  const GemmPlan plan = plan_gemm(problem);
  const LtProduct& product = plan.product;
  const bool is_int8 = problem.a == DType::kInt8;
  CHECK(plan.reason.empty() == (plan.path != GemmPath::kNone), "a refusal has a reason");
  if (plan.path == GemmPath::kNone) return;
  CHECK(problem.n > 0 && problem.k > 0, "n %" PRId64 " k %" PRId64, problem.n, problem.k);
  CHECK(product.rows == problem.n && product.depth == problem.k && product.columns == problem.m, "shape");
  const int64_t element = plan.path == GemmPath::kWide ? 2 : 1;
  // Every row of the operands begins at a multiple of 16 bytes, if the first does; and of the result.
  CHECK(problem.k * element % 16 == 0, "k %" PRId64, problem.k);
  const int64_t result = product.d == LtType::kFloat32 || product.d == LtType::kInt32 ? 4 : 2;
  CHECK(problem.n * result % 16 == 0, "n %" PRId64, problem.n);
  CHECK(product.is_fast == problem.is_fast, "as it was asked for");
  switch (plan.path) {
    case GemmPath::kInt8:
      CHECK(is_int8 && problem.is_aligned && product.a == LtType::kInt8 && product.d == LtType::kInt32, "int8");
      break;
    case GemmPath::kOuter:
      CHECK(problem.arch == 90 && product.has_outer_scales, "outer");
      CHECK(product.d == lt_type(problem.y) && product.has_bias == problem.has_bias, "outer result");
      CHECK(!problem.has_bias || (problem.bias == problem.y && problem.is_bias_aligned), "outer bias");
      CHECK(plan.chunks == 1, "no sums are kept");
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
  CHECK(!problem.is_fast || plan.path == GemmPath::kOuter || plan.path == GemmPath::kFp8, "fast");
  if (plan.path != GemmPath::kOuter) {
    CHECK(!product.has_outer_scales && !product.has_bias, "the epilogue has them");
    if (problem.m > 0) check_chunks(problem, plan.chunks);
  }
}

GemmPath path_of(const GemmProblem& problem) { return plan_gemm(problem).path; }

void test_choices() {
  constexpr DType kE4M3 = DType::kFloat8E4M3, kE5M2 = DType::kFloat8E5M2, kInt8 = DType::kInt8;
  for (int64_t m : {1, 8, 9}) CHECK(path_of(problem_of(kInt8, kInt8, m, 4096, 4096)) == GemmPath::kInt8, "any rows");
  CHECK(path_of(problem_of(kInt8, kInt8, 100, 4095, 4096)) == GemmPath::kNone, "odd n");
  CHECK(path_of(problem_of(kInt8, kInt8, 100, 4096, 4100)) == GemmPath::kNone, "odd k");
  CHECK(path_of(problem_of(kInt8, kInt8, 100, 4096, 0)) == GemmPath::kNone, "no k");
  CHECK(path_of(problem_of(kE4M3, kE4M3, 100, 4096, 4096)) == GemmPath::kOuter, "Hopper scales");
  CHECK(path_of(problem_of(kE5M2, kE4M3, 100, 4096, 4096)) == GemmPath::kOuter, "mixed");
  CHECK(path_of(problem_of(kE5M2, kE5M2, 100, 4096, 4096)) == GemmPath::kWide, "what cuBLASLt lacks");
  CHECK(path_of(problem_of(kE5M2, kE5M2, 100, 4096, 4095)) == GemmPath::kNone, "and odd");
  GemmProblem problem = problem_of(kE4M3, kE4M3, 100, 4096, 4096);
  problem.has_bias = true;
  CHECK(path_of(problem) == GemmPath::kFp8, "a bias of another type");
  problem.bias = DType::kBFloat16;
  CHECK(path_of(problem) == GemmPath::kOuter, "a bias of the same type");
  problem.is_bias_aligned = false;
  CHECK(path_of(problem) == GemmPath::kFp8, "a bias in the middle of others");
  problem.is_bias_aligned = true;
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

void test_without_outer_scales() {
  const GemmProblem problem = problem_of(DType::kFloat8E4M3, DType::kFloat8E5M2, 100, 4096, 4096);
  const GemmPlan plain = plan_without_outer_scales(problem);
  CHECK(path_of(problem) == GemmPath::kOuter && plain.path == GemmPath::kFp8, "scales in the epilogue");
  CHECK(!plain.product.has_outer_scales && plain.product.d == LtType::kFloat32, "of fp32 sums");
}

void check_reason(GemmProblem problem, const std::string& expected) {
  const std::string reason = plan_gemm(problem).reason;
  CHECK(reason == expected, "%s", reason.c_str());
}

void test_reasons() {
  constexpr DType kE4M3 = DType::kFloat8E4M3, kInt8 = DType::kInt8;
  check_reason(problem_of(kInt8, kInt8, 100, 64, 24), "K is 24, expected a positive multiple of 16");
  check_reason(problem_of(kInt8, kInt8, 100, 66, 32), "N is 66, expected a positive multiple of 4");
  check_reason(problem_of(kE4M3, kE4M3, 100, 72, 32), "N is 72, expected a positive multiple of 16");
  GemmProblem problem = problem_of(kE4M3, kE4M3, 100, 64, 32);
  problem.is_aligned = false;
  check_reason(problem, "an operand does not begin at a multiple of 16 bytes");
  problem.is_aligned = problem.is_fast = true;
  check_reason(problem, "");
  problem.arch = 86;
  check_reason(problem, "only fp8 tensor cores add with fewer bits");
  problem = problem_of(kInt8, kInt8, 100, 64, 32);
  problem.is_fast = true;
  check_reason(problem, "only fp8 tensor cores add with fewer bits");
}

int64_t chunks_of_int8(int64_t m, int64_t n, int64_t k, int64_t l2_bytes) {
  GemmProblem problem = problem_of(DType::kInt8, DType::kInt8, m, n, k);
  problem.l2_bytes = l2_bytes;
  return plan_gemm(problem).chunks;
}

void test_chunks() {
  constexpr int64_t kMiB = int64_t{1} << 20;
  // 4096 x 4096: 64 MiB of sums in three chunks of up to 31.25 MiB, on a GPU with 50 MiB of L2 ...
  CHECK(chunks_of_int8(4096, 4096, 4096, 50 * kMiB) == 3, "in L2");
  CHECK(chunks_of_int8(1024, 4096, 4096, 50 * kMiB) == 1, "at once");
  // ... at least 24 and at most 32 MiB on any, ...
  CHECK(chunks_of_int8(6144, 4096, 4096, 6 * kMiB) == 4 && chunks_of_int8(6144, 4096, 4096, 0) == 4, "24 MiB");
  CHECK(chunks_of_int8(6144, 4096, 4096, 126 * kMiB) == 3, "32 MiB");
  // ... but not where reading the weight so often would take longer: Llama-3-70B's down projection.
  CHECK(chunks_of_int8(4096, 8192, 28672, 50 * kMiB) == 1 && chunks_of_int8(16384, 8192, 28672, 50 * kMiB) == 2,
        "256 MiB");
  CHECK(chunks_of_int8(4096, 1 << 20, 4096, 50 * kMiB) == 16, "256 rows, whatever they take");
  // A row more than a chunk holds leaves no single row in a chunk of its own.
  const int64_t most = chunks_of(4672, 14336, 256 * kMiB), more = chunks_of(4673, 14336, 256 * kMiB);
  CHECK(most == 1 && more == 2 && chunk_rows(4673, more, 0).end == 2336, "%" PRId64, chunk_rows(4673, more, 0).end);
}

}  // namespace

int main() {
  for (int arch : kArchs) {
    for (const auto& pair : kPairs) {
      for (int64_t m : {0, 1, 8, 9, 257, 513, 4609, 8192, 100000}) {
        for (int64_t n : {0, 1, 4, 8, 12, 16, 24, 576, 4095, 4096, 128256}) {
          for (int64_t k : {0, 1, 4, 8, 16, 24, 32, 577, 4096, 131071}) {
            for (int flags = 0; flags < 16; ++flags) {
              for (int types = 0; types < 9; ++types) {
                check_plan({arch, m, n, k, pair[0], pair[1], kFloats[types % 3], (flags & 1) != 0, (flags & 2) != 0,
                            (flags & 4) != 0, kFloats[types / 3], (flags & 8) != 0, kL2Bytes});
              }
            }
          }
        }
      }
    }
  }
  test_choices();
  test_without_outer_scales();
  test_reasons();
  test_chunks();
  // Two products that differ in anything have different places in the memory of choices.
  const LtProduct one{LtType::kInt8, LtType::kInt8, LtType::kInt32, 16, 32, 64, false, false, false};
  LtProduct other = one;
  CHECK(!(one < other) && !(other < one), "equal");
  other.has_bias = true;
  CHECK(one < other || other < one, "not equal");
  other = one;
  other.is_fast = true;
  CHECK(one < other || other < one, "not equal");
}
