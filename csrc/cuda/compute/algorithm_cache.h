// The library's choices of an algorithm, remembered by product, and its refusals: the question takes longer than a small
// product.
#pragma once

#include <map>
#include <mutex>
#include <optional>

namespace sq {

template <class Key, class Algorithm>
class AlgorithmCache {
 public:
  // run(algorithm) of the one remembered for `key`, or of what ask() says. False if the library has none, or has one that
  // it will not run after all, which is remembered too: ask() gives nothing, or run() false.
  template <class Ask, class Run>
  bool run(const Key& key, const Ask& ask, const Run& run) {
    const std::optional<Algorithm> algorithm = remembered(key, ask);
    if (!algorithm.has_value()) return false;
    if (run(*algorithm)) return true;
    const std::lock_guard<std::mutex> lock(mutex_);
    known_[key] = std::nullopt;
    return false;
  }

 private:
  template <class Ask>
  std::optional<Algorithm> remembered(const Key& key, const Ask& ask) {
    constexpr size_t kMost = 4096;  // only a stream of ever new shapes reaches it; then all are asked for anew
    const std::lock_guard<std::mutex> lock(mutex_);
    if (const auto found = known_.find(key); found != known_.end()) return found->second;
    if (known_.size() >= kMost) known_.clear();
    return known_[key] = ask();
  }

  std::mutex mutex_;
  std::map<Key, std::optional<Algorithm>> known_;
};

}  // namespace sq
