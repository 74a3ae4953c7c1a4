// One temporary buffer an op call: on the stack when small, so that a call with one token allocates nothing.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace sq {

class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (bytes <= kSmall) return;
    heap_ = static_cast<uint8_t*>(std::aligned_alloc(kAlignment, align(bytes)));
    if (heap_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(heap_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  uint8_t* data() { return heap_ != nullptr ? heap_ : small_; }

  static int64_t align(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

 private:
  static constexpr int64_t kAlignment = 64;
  static constexpr int64_t kSmall = 16 * 1024;
  uint8_t* heap_ = nullptr;
  alignas(kAlignment) uint8_t small_[kSmall];
};

}  // namespace sq
