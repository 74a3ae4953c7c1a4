// What this CPU can do at most: 8-bit multiply-adds in registers, and reading memory. Built and run by machine.py:
//   peaks THREADS -> one JSON object; GOPS count a multiply-add as two.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include <unistd.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
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

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// 4 tiles of sums from 2 of either operand: with fewer sums, a product would wait for the one before.
#define ZERO_TILE(i) _tile_zero(i);
#define TILE_PEAK(NAME, PRODUCT)                                   \
  TARGET("amx-tile,amx-int8,amx-bf16") void NAME(int64_t rounds) { \
    static const TileConfig config;                                \
    _tile_loadconfig(&config);                                     \
    EIGHT(ZERO_TILE, )                                             \
    for (int64_t round = 0; round < rounds; ++round) {             \
      PRODUCT(0, 4, 6);                                            \
      PRODUCT(1, 4, 7);                                            \
      PRODUCT(2, 5, 6);                                            \
      PRODUCT(3, 5, 7);                                            \
    }                                                              \
    _tile_release();                                               \
  }
TILE_PEAK(amx_int8, _tile_dpbusd)
TILE_PEAK(amx_bf16, _tile_dpbf16ps)

// Whether CPU and operating system let this process use AMX.
bool has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool in_cpu = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx >> 22 & 1) && (edx >> 25 & 1);
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return in_cpu && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
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
  if (has_amx()) {
    constexpr int64_t kTileRounds = 1'000'000;  // of 4 products of 16 x 64 x 16 int8 values, or half of that in bf16
    const double int8 = best_seconds(threads, [](int) { amx_int8(kTileRounds); });
    std::printf(", \"int8_gops\": %.1f", 4.0 * 32768 * kTileRounds * threads / int8 / 1e9);
    const double bfloat16 = best_seconds(threads, [](int) { amx_bf16(kTileRounds); });
    std::printf(", \"bf16_gflops\": %.1f", 4.0 * 16384 * kTileRounds * threads / bfloat16 / 1e9);
  }
  const char* prefix = has_amx() ? "vector_" : "";
  if (__builtin_cpu_supports("avx512vnni")) {
    const double seconds = best_seconds(threads, [](int) { vnni(kRounds); });
    std::printf(", \"%sint8_gops\": %.1f", prefix, 24.0 * 128 * kRounds * threads / seconds / 1e9);
  }
  if (__builtin_cpu_supports("avx512bf16")) {
    const double seconds = best_seconds(threads, [](int) { bf16(kRounds); });
    std::printf(", \"%sbf16_gflops\": %.1f", prefix, 24.0 * 64 * kRounds * threads / seconds / 1e9);
  }
#endif
  // Several times what the caches hold.
  const int64_t size = std::max<int64_t>(int64_t{512} << 20, 4 * (sysconf(_SC_LEVEL3_CACHE_SIZE) >> 21 << 21));
  auto* memory = static_cast<uint64_t*>(std::aligned_alloc(1 << 21, size));
  for (int64_t i = 0; i < size / 8; ++i) memory[i] = static_cast<uint64_t>(i);
  const int64_t share = size / 8 / threads;
  const double dram = best_seconds(threads, [&](int thread) { read_all(memory + thread * share, share); });
  std::printf(", \"dram_gbytes_per_s\": %.1f}\n", static_cast<double>(share * 8 * threads) / dram / 1e9);
  std::free(memory);
  return 0;
}
