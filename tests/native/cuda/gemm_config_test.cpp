// The choice among our own tensor-core products: what is chosen can run, what cannot run has a reason, what is listed is
// what exists, and the estimate behaves as times do.
#include "cuda/kernels/gemm_config.h"

#include <set>
#include <utility>

#include "cuda/kernels/code_arch.h"
#include "native/testing.h"

namespace {

using namespace sq;

constexpr DType kInt8 = DType::kInt8, kE4M3 = DType::kFloat8E4M3, kE5M2 = DType::kFloat8E5M2;

TileProblem problem_of(int64_t m, int64_t n, int64_t k, int arch, DType dtype = kInt8) {
  return {m, n, k, dtype, dtype, 2, true, arch, arch, arch == 90 || arch == 100, arch == 80 ? 108 : 132};
}

std::string reason_of(const TileProblem& problem, GemmFamily family) {
  const GemmChoice choice = choose_config(problem, family);
  CHECK((choice.config == nullptr) == !choice.reason.empty(), "one or the other");
  return choice.reason;
}

void test_reasons() {
  constexpr GemmFamily kMma = GemmFamily::kMma, kWgmma = GemmFamily::kWgmma;
  const auto expect = [](const TileProblem& problem, GemmFamily family, const std::string& reason) {
    CHECK(reason_of(problem, family) == reason, "'%s'", reason_of(problem, family).c_str());
  };
  for (int arch : {80, 86, 89, 90, 100, 120}) expect(problem_of(1, 1, 16, arch), kMma, "");
  for (int arch : {89, 90, 100, 120}) expect(problem_of(1, 1, 16, arch, kE5M2), kMma, "");
  for (DType dtype : {kInt8, kE4M3, kE5M2}) expect(problem_of(1, 1, 16, 90, dtype), kWgmma, "");
  expect(problem_of(1, 1, 16, 86, kE4M3), kMma, "compute capability 8.6 has no fp8 tensor cores");
  expect(problem_of(1, 1, 16, 75), kMma, "mma needs compute capability 8.0, and this GPU is of 7.5");
  expect(problem_of(1, 1, 16, 100), kWgmma,
         "wgmma is an instruction of compute capability 9.0, and this GPU is of 10.0");
  expect(problem_of(1, 1, 33, 90), kMma, "K is 33, expected a positive multiple of 16");
  expect(problem_of(1, 1, 0, 90), kWgmma, "K is 0, expected a positive multiple of 16");
  expect(problem_of(int64_t{1} << 30, int64_t{1} << 20, 16, 90), kMma, "M=1073741824, N=1048576 and K=16 are too many");
  expect(problem_of(1, int64_t{1} << 31, 16, 90), kWgmma, "M=1, N=2147483648 and K=16 are too many");
  TileProblem problem = problem_of(1, 1, 16, 90, kE4M3);
  problem.is_aligned = false;
  expect(problem, kWgmma, "an operand does not begin at a multiple of 16 bytes");
  problem.is_aligned = true;
  problem.is_arch_specific = false;
  expect(problem, kWgmma, "wgmma needs code for 90a, which this library was built without");
  problem.code_arch = 80;
  expect(problem, kMma, "fp8 needs code for 89 or newer, and what this library has for this GPU is for 80");
  CHECK(choose_config(problem, std::nullopt).reason ==
            "wgmma needs code for 90a, which this library was built without; fp8 needs code for 89 or newer, and what "
            "this library has for this GPU is for 80",
        "every reason once");
  CHECK(why_not(kGemmConfigs[1], problem_of(65, 16, 16, 90)) == "swapped operands take up to 64 rows, and M is 65",
        "few rows");
  problem.a = problem.b = kInt8;
  expect(problem, kMma, "");
}

void test_choices() {
  for (int arch : {75, 80, 86, 87, 89, 90, 100, 103, 120, 121}) {
    for (DType dtype : {kInt8, kE4M3}) {
      for (int64_t m : {1, 16, 127, 128, 129, 4096, 100000}) {
        for (int64_t n : {1, 16, 576, 4096, 128256}) {
          for (int64_t k : {0, 8, 16, 4096, 131056}) {
            const TileProblem problem = problem_of(m, n, k, arch, dtype);
            const GemmChoice choice = choose_config(problem, std::nullopt);
            double least = 1e300;
            for (const GemmConfig& config : kGemmConfigs) {
              if (!why_not(config, problem).empty()) continue;
              for (int splits = 1; splits <= most_splits(config, problem); ++splits) {
                least = std::min(least, estimate(config, problem, splits));
              }
            }
            CHECK((choice.config == nullptr) == (least == 1e300), "what can be taken is");
            if (choice.config == nullptr) continue;
            CHECK(why_not(*choice.config, problem).empty(), "what is taken can run");
            CHECK(estimate(*choice.config, problem, choice.splits) == least, "and is the fastest");
            CHECK(choice.splits == 1 || choice.config->kernel == GemmKernel::kSwapped, "only one splits k");
            CHECK(choice.splits <= tiles_of(k, choice.config->tile_k), "and into whole tiles");
          }
        }
      }
    }
  }
  const auto expect = [](int64_t m, int64_t n, int arch, GemmKernel kernel) {
    CHECK(choose_config(problem_of(m, n, 4096, arch), std::nullopt).config->kernel == kernel, "m %" PRId64, m);
  };
  expect(4096, 4096, 80, GemmKernel::kMma);
  expect(4096, 4096, 90, GemmKernel::kWgmma);
  expect(65, 4096, 90, GemmKernel::kWgmma);
  for (int64_t m : {1, 16, 64}) {
    expect(m, 4096, 90, GemmKernel::kSwapped);
    const GemmChoice choice = choose_config(problem_of(m, 4096, 4096, 90), GemmFamily::kWgmma);
    // 32 tiles of weights alone would leave three quarters of the GPU without work.
    CHECK(choice.config->kernel == GemmKernel::kSwapped && choice.splits >= 2 && 32 * choice.splits <= 132, "%d splits",
          choice.splits);
  }
}

// What tests/test_cuda_emulated.py relies on, on its device of three multiprocessors.
void test_small_device() {
  for (const auto& [m, n] : {std::pair{5, 40}, std::pair{20, 33}}) {
    for (DType dtype : {kInt8, kE4M3}) {
      TileProblem problem = problem_of(m, n, 4096, 90, dtype);
      problem.multiprocessors = 3;
      const GemmChoice choice = choose_config(problem, GemmFamily::kWgmma);
      CHECK(choice.config->kernel == GemmKernel::kSwapped && choice.splits > 1, "%d splits", choice.splits);
    }
  }
}

void test_estimates() {
  for (const GemmConfig& config : kGemmConfigs) {
    const int arch = config.family == GemmFamily::kWgmma ? 90 : 80;
    const double whole = estimate(config, problem_of(4096, 4096, 4096, arch), 1);
    for (int axis = 0; axis < 3; ++axis) {
      double before = 0.0;
      for (int64_t size : {1, 100, 128, 1000, 4096, 10000}) {
        const double time = estimate(config,
                                     problem_of(axis == 0 ? size : 4096, axis == 1 ? size : 4096,
                                                axis == 2 ? (size + 15) / 16 * 16 : 4096, arch),
                                     1);
        CHECK(time >= before, "larger products take no less");
        before = time;
      }
    }
    // 2 * 4096^3 operations at the data sheets' dense rates, 624 and 1979 TOPS, are the floor.
    const double floor = 2.0 * 4096 * 4096 * 4096 / (arch == 80 ? 624e6 : 1979e6);
    CHECK(config.kernel == GemmKernel::kSwapped || (whole > floor && whole < 3 * floor), "%g us, floor %g", whole,
          floor);
    // One row of a large weight: its bytes from memory.
    const double row = estimate(config, problem_of(1, 14336, 4096, arch), 1);
    CHECK(row >= 14336.0 * 4096 / (device_rates(arch).memory_bytes * 1e3), "%g us", row);
  }
}

// Every kernel is listed once.
void test_table() {
  std::set<GemmKernel> kernels;
  for (const GemmConfig& config : kGemmConfigs) kernels.insert(config.kernel);
  CHECK(kernels.size() == 3 && std::size(kGemmConfigs) == 3, "one configuration of a kernel");
}

void test_code() {
  const auto expect = [](const char* archs, int arch, int built, bool is_specific) {
    const CodeArch code = code_arch(archs, arch);
    CHECK(code.arch == built && code.is_specific == is_specific, "%s on %d: %d", archs, arch, code.arch);
  };
  const char* kRelease = "80+PTX 89 90a 100a 120";
  expect(kRelease, 80, 80, false);
  expect(kRelease, 86, 80, false);
  expect(kRelease, 89, 89, false);
  expect(kRelease, 90, 90, true);
  expect(kRelease, 100, 100, true);
  expect(kRelease, 103, 80, false);  // PTX
  expect(kRelease, 121, 120, false);
  expect(kRelease, 75, 0, false);
  expect("80 90", 90, 90, false);
  expect("90 90a", 90, 90, true);
  expect("90a 90", 90, 90, true);
  expect("80", 90, 0, false);
  expect("100f", 103, 100, false);
  expect("", 90, 0, false);
}

}  // namespace

int main() {
  test_reasons();
  test_choices();
  test_small_device();
  test_estimates();
  test_table();
  test_code();
}
