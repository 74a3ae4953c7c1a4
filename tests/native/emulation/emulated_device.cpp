// A device that is none: an architecture from the environment, and products as cuBLASLt defines them, in plain loops that
// insist on what cuBLASLt insists on. In the place of csrc/cuda/compute/devices.cpp, cublaslt.cpp and tensor_map.cpp.
//
//   SQ_EMULATED_ARCH, SQ_EMULATED_ARCHS  the device's architecture, and those that the library has code for
//   SQ_EMULATED_L2                       bytes of its cache
//   SQ_EMULATED_DEVICE                   a name: with a new one, nothing was made for the device yet
//   SQ_EMULATED_CAPTURES                 1: a graph is being captured, in which no handle can be made
//   SQ_EMULATED_REFUSES                  what cuBLASLt has no algorithm for: all, sums (all but those with outer scales),
//                                        outer, fast, M=12 (products of so many rows); matmul: it has one for all products
//                                        but outer ones, and will run none
#include <cstdlib>
#include <set>
#include <string>
#include <utility>

#include "common/dtypes.h"
#include "cuda/compute/algorithm_cache.h"
#include "cuda/compute/cublaslt.h"
#include "cuda/compute/devices.h"
#include "cuda/compute/tensor_map.h"
#include "cuda/kernels/tile_maps.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

// Launches of kernels so far, cuBLASLt's included.
extern "C" __attribute__((visibility("default"))) int64_t sq_emulated_launches() { return shim::launches; }

namespace sq {
namespace {

const char* environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

double load(const void* x, LtType type, int64_t index) {
  switch (type) {
    case LtType::kInt8:
      return static_cast<const int8_t*>(x)[index];
    case LtType::kFloat8E4M3:
      return float8_e4m3_to_float(static_cast<const uint8_t*>(x)[index]);
    case LtType::kFloat8E5M2:
      return float8_e5m2_to_float(static_cast<const uint8_t*>(x)[index]);
    case LtType::kBFloat16:
      return to_float(static_cast<const BFloat16*>(x)[index]);
    case LtType::kFloat16:
      return to_float(static_cast<const Float16*>(x)[index]);
    default:
      return static_cast<const float*>(x)[index];
  }
}

void store(void* x, LtType type, int64_t index, double value) {
  switch (type) {
    case LtType::kInt32:
      static_cast<int32_t*>(x)[index] = static_cast<int32_t>(value);
      break;
    case LtType::kBFloat16:
      from_float(static_cast<float>(value), static_cast<BFloat16*>(x) + index);
      break;
    case LtType::kFloat16:
      from_float(static_cast<float>(value), static_cast<Float16*>(x) + index);
      break;
    default:
      static_cast<float*>(x)[index] = static_cast<float>(value);
  }
}

void insist(bool condition, const char* what) { SQ_CHECK(condition, "emulated device: ", what); }

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

void insist_on_operands(const LtProduct& product, const LtOperands& operands) {
  const bool is_fp8 = product.a == LtType::kFloat8E4M3 || product.a == LtType::kFloat8E5M2;
  insist(is_aligned(operands.a) && is_aligned(operands.b) && is_aligned(operands.d), "16 bytes");
  insist(product.depth % 4 == 0 && product.rows % 4 == 0, "multiples of 4");
  insist(!is_fp8 || (product.depth % 16 == 0 && product.rows % 16 == 0), "multiples of 16 in fp8");
  insist(!is_fp8 || device_arch(0) >= 89, "fp8 needs sm_89");
  insist(product.a != LtType::kFloat8E5M2 || product.b != LtType::kFloat8E5M2, "there is no e5m2 x e5m2");
  insist((product.a == LtType::kInt8) == (product.d == LtType::kInt32), "int8 gives int32");
  insist(!product.has_outer_scales || (is_fp8 && device_arch(0) == 90), "outer scales are of sm_90");
  insist(!product.has_bias || product.d == LtType::kBFloat16 || product.d == LtType::kFloat16, "bias of 16 bits");
  insist(product.columns > 0, "rows to multiply");
  insist(!product.is_fast || is_fp8, "only fp8 products are added fast");
  insist(!product.has_outer_scales || (is_aligned(operands.a_scale) && is_aligned(operands.b_scale)),
         "scales at 16 bytes");
  insist(!product.has_bias || is_aligned(operands.bias), "a bias at 16 bytes");
}

void make_handle() {
  static std::set<std::string> made;
  if (made.count(environment("SQ_EMULATED_DEVICE")) != 0) return;
  insist(environment("SQ_EMULATED_CAPTURES") != std::string("1"), "a handle is made while a graph is captured");
  made.insert(environment("SQ_EMULATED_DEVICE"));
}

bool is_known(const std::string& refused, const LtProduct& product) {
  if (refused == "sums") return product.has_outer_scales;
  if (refused == "outer" || refused == "matmul") return !product.has_outer_scales;
  if (refused == "fast") return !product.is_fast;
  return refused != "all" && refused != "M=" + std::to_string(product.columns);
}

void multiply(const LtProduct& product, const LtOperands& operands) {
  ++shim::launches;
  for (int64_t column = 0; column < product.columns; ++column) {
    for (int64_t row = 0; row < product.rows; ++row) {
      double sum = 0;
      for (int64_t k = 0; k < product.depth; ++k) {
        sum += load(operands.a, product.a, row * product.depth + k) *
               load(operands.b, product.b, column * product.depth + k);
      }
      if (product.has_outer_scales) sum *= static_cast<double>(operands.a_scale[row]) * operands.b_scale[column];
      if (product.has_bias) sum += load(operands.bias, product.d, row);
      store(operands.d, product.d, column * product.rows + row, sum);
    }
  }
}

}  // namespace

int device_arch(int) {
  const std::string arch = environment("SQ_EMULATED_ARCH");
  return arch.empty() ? 90 : std::stoi(arch);
}

CodeArch device_code(int device) { return code_arch(cuda_archs(), device_arch(device)); }

int multiprocessors(int) { return 3; }

std::string cuda_archs() {
  const std::string archs = environment("SQ_EMULATED_ARCHS");
  return archs.empty() ? "80+PTX 89 90a 100a 120" : archs;
}

// Less than an H100 has, so that short rows are too long.
int64_t shared_bytes(int) { return 98 * 1024; }

int64_t l2_bytes(int) {
  const std::string bytes = environment("SQ_EMULATED_L2");
  return bytes.empty() ? int64_t{50} << 20 : std::stoll(bytes);
}

TensorMap map_of_rows(const char*, const uint8_t* data, int64_t rows, int64_t k, int box_rows) {
  insist(is_aligned(data) && k % 16 == 0, "a tensor map of rows at multiples of 16 bytes");
  return shim::map_of_rows({data, rows, k, box_rows, WgmmaTile::kK});
}

bool lt_multiply(const char*, const LtProduct& product, const LtOperands& operands, const Tensor&) {
  static AlgorithmCache<std::pair<std::string, LtProduct>, bool> known;
  insist(emulated::has_context(), "this thread has no context");
  make_handle();
  const std::string refused = environment("SQ_EMULATED_REFUSES");
  const auto ask = [&] { return is_known(refused, product) ? std::optional<bool>(true) : std::nullopt; };
  return known.run({refused, product}, ask, [&](bool) {
    if (refused == "matmul") return false;
    insist_on_operands(product, operands);
    multiply(product, operands);
    return true;
  });
}

void lt_warm_up(const char*, int) {
  insist(emulated::has_context(), "this thread has no context");
  make_handle();
}

}  // namespace sq
