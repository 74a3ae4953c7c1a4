// The tables of ways, one for int8 and one for fp8. Products read them without a lock, so a table that was set once stays.
#include "cuda/compute/ways.h"

#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

#include "common/checks.h"

namespace sq {
namespace {

constexpr const char* kDTypes[] = {"int8", "fp8"};  // of a

std::atomic<const WayTable*> current[2];

int dtype_index(const char* op, const std::string& dtype) {
  for (int i = 0; i < 2; ++i) {
    if (dtype == kDTypes[i]) return i;
  }
  fail(op, ": dtype is '", dtype, "', expected int8 or fp8");
}

// The table of a text, made once.
const WayTable* table_of(const char* op, int dtype, const std::string& text) {
  static std::mutex mutex;
  static std::map<std::pair<int, std::string>, WayTable> tables;
  const std::lock_guard<std::mutex> lock(mutex);
  const std::pair<int, std::string> key(dtype, text);
  if (const auto found = tables.find(key); found != tables.end()) return &found->second;
  WayTable table;
  const std::string wrong = parse_way_table(text, dtype == 1, &table);
  SQ_CHECK(wrong.empty(), op, ": ", wrong);
  return &(tables[key] = table);
}

const WayTable& current_table(int dtype) {
  if (const WayTable* table = current[dtype].load(std::memory_order_acquire)) return *table;
  static const WayTable* const unmeasured[] = {table_of("", 0, kUnmeasuredTable), table_of("", 1, kUnmeasuredTable)};
  return *unmeasured[dtype];
}

}  // namespace

Ways ways_for(const char* op, DType a, int64_t rows) {
  const char* value = std::getenv("SMOOTHQUANT_CUDA_GEMM");
  if (value == nullptr || *value == '\0' || value == std::string("auto")) {
    return {current_table(a == DType::kInt8 ? 0 : 1).of(rows), false};
  }
  const std::optional<Way> way = way_named(value);
  SQ_CHECK(way.has_value(), op, ": SMOOTHQUANT_CUDA_GEMM is '", value, "', expected auto, ", kWayList);
  Ways ways{{}, true};
  ways.list.ways[0] = *way;
  ways.list.count = 1;
  return ways;
}

void set_ways(const char* op, const std::string& dtype, const std::string& table) {
  const int index = dtype_index(op, dtype);
  current[index].store(table_of(op, index, table), std::memory_order_release);
}

WayList ranked_ways(const char* op, const std::string& dtype, int64_t rows) {
  return current_table(dtype_index(op, dtype)).of(rows);
}

}  // namespace sq
