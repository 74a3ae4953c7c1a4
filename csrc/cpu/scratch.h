// One temporary buffer an op call. Small ones are on the stack; middling ones are kept by the calling thread for its next
// call, because fresh memory costs a page fault every 4 KB, as much as quantizing them does.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace sq {

class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (bytes <= kOnStack) return;
    Block& kept = kept_block();
    if (kept.bytes >= bytes) {
      // Taken out for as long as it is in use.
      block_ = std::move(kept);
      kept = Block();
      return;
    }
    block_.bytes = align(bytes);
    block_.memory.reset(static_cast<uint8_t*>(std::aligned_alloc(kAlignment, block_.bytes)));
    if (block_.memory == nullptr) throw std::bad_alloc();
  }

  ~Scratch() {
    Block& kept = kept_block();
    if (block_.bytes > kept.bytes && block_.bytes <= kKept) kept = std::move(block_);
  }

  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  uint8_t* data() { return block_.memory != nullptr ? block_.memory.get() : small_; }

  static int64_t align(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

 private:
  static constexpr int64_t kAlignment = 64;
  static constexpr int64_t kOnStack = 16 * 1024;
  static constexpr int64_t kKept = 8 * 1024 * 1024;

  struct Free {
    void operator()(uint8_t* memory) const { std::free(memory); }
  };
  struct Block {
    std::unique_ptr<uint8_t, Free> memory;
    int64_t bytes = 0;
  };

  static Block& kept_block() {
    thread_local Block block;
    return block;
  }

  Block block_;
  alignas(kAlignment) uint8_t small_[kOnStack];
};

}  // namespace sq
