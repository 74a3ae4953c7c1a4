// What this CPU can do at most: 8-bit multiply-adds in registers, and reading memory. Built and run by peaks.py:
//   peaks THREADS -> one JSON object; GOPS count a multiply-add as two.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET(features) __attribute__((target(features)))

// 24 independent sums, as many as the latency and the ports can ask for.
#define EIGHT(STEP, i) STEP(i##0) STEP(i##1) STEP(i##2) STEP(i##3) STEP(i##4) STEP(i##5) STEP(i##6) STEP(i##7)
#define TWENTY_FOUR(STEP) EIGHT(STEP, 0) EIGHT(STEP, 1) EIGHT(STEP, 2)

TARGET("avx512f,avx512bw,avx512vnni") void vnni(int64_t rounds) {
  __m512i a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
#define SUM(i) __m512i s##i = _mm512_setzero_si512();
  TWENTY_FOUR(SUM)
#undef SUM
  for (int64_t round = 0; round < rounds; ++round) {
#define STEP(i) __asm__ volatile("vpdpbusd %1, %2, %0" : "+v"(s##i) : "v"(a), "v"(b));
    TWENTY_FOUR(STEP)
#undef STEP
  }
}

TARGET("avx512f,avx512bf16") void bf16(int64_t rounds) {
  __m512i a = _mm512_set1_epi8(1), b = _mm512_set1_epi8(2);
#define SUM(i) __m512 s##i = _mm512_setzero_ps();
  TWENTY_FOUR(SUM)
#undef SUM
  for (int64_t round = 0; round < rounds; ++round) {
#define STEP(i) __asm__ volatile("vdpbf16ps %1, %2, %0" : "+v"(s##i) : "v"(a), "v"(b));
    TWENTY_FOUR(STEP)
#undef STEP
  }
}
#endif

namespace {

using Clock = std::chrono::steady_clock;

// The best of several runs of work(thread) on all threads at once, in seconds.
template <class Work>
double best_seconds(int threads, const Work& work) {
  double best = 1e30;
  for (int repeat = 0; repeat < 7; ++repeat) {
    std::vector<std::thread> others;
    const auto start = Clock::now();
    for (int thread = 1; thread < threads; ++thread) others.emplace_back([&, thread] { work(thread); });
    work(0);
    for (std::thread& other : others) other.join();
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    best = seconds < best ? seconds : best;
  }
  return best;
}

volatile uint64_t sink;

void read_all(const uint64_t* data, int64_t count) {
  uint64_t sums[8] = {};
  for (int64_t i = 0; i + 8 <= count; i += 8) {
    for (int lane = 0; lane < 8; ++lane) sums[lane] ^= data[i + lane];
  }
  sink = sums[0] ^ sums[1] ^ sums[2] ^ sums[3] ^ sums[4] ^ sums[5] ^ sums[6] ^ sums[7];
}

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  std::printf("{\"threads\": %d", threads);
#if defined(__x86_64__)
  constexpr int64_t kRounds = 5'000'000;
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni")) {
    const double seconds = best_seconds(threads, [](int) { vnni(kRounds); });
    std::printf(", \"int8_gops\": %.1f", 24.0 * 128 * kRounds * threads / seconds / 1e9);
  }
  if (__builtin_cpu_supports("avx512bf16")) {
    const double seconds = best_seconds(threads, [](int) { bf16(kRounds); });
    std::printf(", \"bf16_gflops\": %.1f", 24.0 * 64 * kRounds * threads / seconds / 1e9);
  }
#endif
  // Larger than any cache.
  const int64_t size = int64_t{512} << 20;
  auto* memory = static_cast<uint64_t*>(std::aligned_alloc(1 << 21, size));
  for (int64_t i = 0; i < size / 8; ++i) memory[i] = static_cast<uint64_t>(i);
  const int64_t share = size / 8 / threads;
  const double dram = best_seconds(threads, [&](int thread) { read_all(memory + thread * share, share); });
  std::printf(", \"dram_gbytes_per_s\": %.1f}\n", static_cast<double>(share * 8 * threads) / dram / 1e9);
  std::free(memory);
  return 0;
}
