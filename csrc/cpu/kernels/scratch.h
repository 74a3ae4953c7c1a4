// One temporary buffer an op call. Small ones are on the stack; larger ones are kept by the calling thread for its next
// call, because fresh memory costs a page fault every 4 KB, as much as quantizing them does.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace sq {

class Scratch {
 public:
  explicit Scratch(int64_t bytes) {
    if (bytes > kOnStack) block_ = take(align(bytes));
  }
  ~Scratch() {
    if (block_.memory != nullptr && block_.bytes <= kKept) kept_blocks().push_back(std::move(block_));
  }

  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  uint8_t* data() { return block_.memory != nullptr ? block_.memory.get() : small_; }

  static int64_t align(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

 private:
  static constexpr int64_t kAlignment = 64;
  static constexpr int64_t kOnStack = 16 * 1024;
  static constexpr int64_t kKept = 64 * 1024 * 1024;

  struct Free {
    void operator()(uint8_t* memory) const { std::free(memory); }
  };
  struct Block {
    std::unique_ptr<uint8_t, Free> memory;
    int64_t bytes = 0;
  };

  // As many as buffers were ever in use at once: two or three.
  static std::vector<Block>& kept_blocks() {
    thread_local std::vector<Block> blocks;
    return blocks;
  }

  // The smallest kept block that is large enough, or a new one in the place of the largest kept.
  static Block take(int64_t bytes) {
    std::vector<Block>& kept = kept_blocks();
    size_t best = kept.size();
    for (size_t i = 0; i < kept.size(); ++i) {
      if (best == kept.size() || is_better(kept[i].bytes, kept[best].bytes, bytes)) best = i;
    }
    Block block;
    if (best < kept.size()) {
      block = std::move(kept[best]);
      kept.erase(kept.begin() + static_cast<std::ptrdiff_t>(best));
      if (block.bytes >= bytes) return block;
    }
    block.memory.reset(static_cast<uint8_t*>(std::aligned_alloc(kAlignment, bytes)));
    if (block.memory == nullptr) throw std::bad_alloc();
    block.bytes = bytes;
    return block;
  }

  static bool is_better(int64_t a, int64_t b, int64_t wanted) {
    return (a >= wanted) == (b >= wanted) ? (a < b) == (a >= wanted) : a >= wanted;
  }

  Block block_;
  alignas(kAlignment) uint8_t small_[kOnStack];
};

// Parts of one buffer: their sizes first, their addresses when it exists.
class Plan {
 public:
  template <class T>
  struct Part {
    int64_t offset;

    T* in(uint8_t* memory) const { return reinterpret_cast<T*>(memory + offset); }
    T* in(Scratch& scratch) const { return in(scratch.data()); }
  };

  template <class T = uint8_t>
  Part<T> add(int64_t count) {
    const int64_t offset = bytes_;
    bytes_ += Scratch::align(count * static_cast<int64_t>(sizeof(T)));
    return {offset};
  }

  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_ = 0;
};

}  // namespace sq
