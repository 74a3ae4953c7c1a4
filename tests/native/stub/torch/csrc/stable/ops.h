// Stands in for torch's thread pool in native tests, so that sanitizers see all there is: parallel_for cuts a range as
// torch does and runs the pieces on std::threads at once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

inline int64_t& number_of_threads() {
  static int64_t threads = 1;
  return threads;
}

inline int64_t get_num_threads() { return number_of_threads(); }

template <class Work>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Work& work) {
  const int64_t most = std::max<int64_t>(1, (end - begin + grain - 1) / std::max<int64_t>(1, grain));
  const int64_t threads = std::min(number_of_threads(), most);
  if (threads == 1) return work(begin, end);
  const int64_t piece = (end - begin + threads - 1) / threads;
  std::vector<std::thread> workers;
  for (int64_t first = begin; first < end; first += piece) {
    workers.emplace_back([&work, first, last = std::min(end, first + piece)] { work(first, last); });
  }
  for (std::thread& worker : workers) worker.join();
}

}  // namespace torch::stable
