// What the native tests share: checks, memory of an exact size, random numbers.
#pragma once

#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <type_traits>

#include "common/dtypes.h"

namespace sq {

#define CHECK(condition, ...)                                              \
  do {                                                                     \
    if (!(condition)) {                                                    \
      std::fprintf(stderr, "%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::fprintf(stderr, __VA_ARGS__);                                   \
      std::fprintf(stderr, "\n");                                          \
      std::exit(1);                                                        \
    }                                                                      \
  } while (false)

// Memory of exactly this size, aligned as torch aligns tensors.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : count_(count), data_(static_cast<T*>(allocate(count * sizeof(T)))) {}
  T* data() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }
  int64_t size() const { return count_; }

 private:
  struct Free {
    void operator()(T* memory) const { std::free(memory); }
  };
  static void* allocate(size_t bytes) {
    void* memory = nullptr;
    CHECK(posix_memalign(&memory, 64, bytes > 0 ? bytes : 1) == 0, "no memory for %zu bytes", bytes);
    return memory;
  }
  int64_t count_;
  std::unique_ptr<T, Free> data_;
};

inline std::mt19937 generator(0);

inline int random_int(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }
inline float random_float() { return std::normal_distribution<float>()(generator); }

// Normally distributed, by default as far as activations bend.
template <class T>
Buffer<T> random_values(int64_t count, float spread = 3) {
  Buffer<T> values(count);
  for (int64_t i = 0; i < count; ++i) from_float(random_float() * spread, &values[i]);
  return values;
}

template <class T>
constexpr DType kDType = std::is_same_v<T, float>      ? DType::kFloat32
                         : std::is_same_v<T, BFloat16> ? DType::kBFloat16
                                                       : DType::kFloat16;

// The same bits; a NaN equals any NaN.
inline bool same(float a, float b) { return std::isnan(a) ? std::isnan(b) : float_bits(a) == float_bits(b); }

}  // namespace sq
