// Ways to multiply, and which to try for how many rows: a ranking as text, "8=skinny,library,torch;=library,torch", and its
// classes. Pure functions, so that they can be tested without a GPU.
//
//   way           computes with
//   library       cuBLASLt, see gemm_plan.h
//   library_fast  the same, adding fp8 products with fewer bits
//   skinny        skinny.cuh, for few rows
//   mma, wgmma    our tensor-core kernels, see gemm_config.h
//   torch         torch's own products, in Python
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <optional>
#include <string>
#include <vector>

namespace sq {

enum class Way { kLibrary, kLibraryFast, kSkinny, kMma, kWgmma, kTorch };

constexpr int kWayCount = 6;
constexpr const char* kWayNames[kWayCount] = {"library", "library_fast", "skinny", "mma", "wgmma", "torch"};
constexpr const char* kWayList = "library, library_fast, skinny, mma, wgmma or torch";

constexpr const char* name_of(Way way) { return kWayNames[static_cast<int>(way)]; }

inline std::optional<Way> way_named(const std::string& name) {
  for (int i = 0; i < kWayCount; ++i) {
    if (name == kWayNames[i]) return static_cast<Way>(i);
  }
  return std::nullopt;
}

// Ways in the order in which to try them.
struct WayList {
  std::array<Way, kWayCount> ways;
  int count = 0;

  const Way* begin() const { return ways.data(); }
  const Way* end() const { return ways.data() + count; }
};

inline std::string text_of(const WayList& list) {
  std::string text;
  for (Way way : list) text += (text.empty() ? "" : ",") + std::string(name_of(way));
  return text;
}

struct WayClass {
  int64_t most_rows;
  WayList list;
};

// For up to most_rows rows of each class, in ascending order; the last has no end.
struct WayTable {
  std::vector<WayClass> classes;

  const WayList& of(int64_t rows) const {
    for (const WayClass& one : classes) {
      if (rows <= one.most_rows) return one.list;
    }
    return classes.back().list;
  }
};

// What is tried before anybody has measured: any size has a way of ours.
constexpr const char* kUnmeasuredTable = "8=skinny,library,torch;=library,skinny,torch";

inline std::vector<std::string> split_text(const std::string& text, char separator) {
  std::vector<std::string> parts;
  size_t begin = 0;
  for (size_t end; (end = text.find(separator, begin)) != std::string::npos; begin = end + 1) {
    parts.push_back(text.substr(begin, end - begin));
  }
  parts.push_back(text.substr(begin));
  return parts;
}

// A number of rows, or nothing if it is not a positive one of at most 18 digits.
inline std::optional<int64_t> parse_rows(const std::string& text) {
  constexpr size_t kMostDigits = 18;
  if (text.empty() || text.size() > kMostDigits || text.find_first_not_of("0123456789") != std::string::npos) {
    return std::nullopt;
  }
  const int64_t rows = std::stoll(text);
  return rows > 0 ? std::optional<int64_t>(rows) : std::nullopt;
}

// What is wrong with "skinny,library", or nothing.
inline std::string parse_way_list(const std::string& text, bool is_fp8, WayList* list) {
  for (const std::string& name : split_text(text, ',')) {
    const std::optional<Way> way = way_named(name);
    if (!way.has_value()) return "there is no way '" + name + "' to multiply, expected " + kWayList;
    if (*way == Way::kLibraryFast && !is_fp8) return "library_fast is for fp8 only";
    if (std::find(list->begin(), list->end(), *way) != list->end()) return name + " is twice in '" + text + "'";
    list->ways[list->count++] = *way;
  }
  return "";
}

// What is wrong with a table, or nothing.
inline std::string parse_way_table(const std::string& text, bool is_fp8, WayTable* table) {
  const std::vector<std::string> classes = split_text(text, ';');
  for (size_t i = 0; i < classes.size(); ++i) {
    const size_t equals = classes[i].find('=');
    if (equals == std::string::npos) return "'" + classes[i] + "' has no '=', expected rows=way,way";
    const std::string bound = classes[i].substr(0, equals);
    WayClass one{std::numeric_limits<int64_t>::max(), {}};
    if (i + 1 < classes.size()) {
      const std::optional<int64_t> rows = parse_rows(bound);
      if (!rows.has_value()) return "'" + bound + "' is no positive number of rows";
      if (!table->classes.empty() && *rows <= table->classes.back().most_rows) {
        return bound + " rows follow " + std::to_string(table->classes.back().most_rows) +
               ", expected ascending numbers";
      }
      one.most_rows = *rows;
    } else if (!bound.empty()) {
      return "the last class ends at '" + bound + "' rows, expected one without an end";
    }
    if (std::string wrong = parse_way_list(classes[i].substr(equals + 1), is_fp8, &one.list); !wrong.empty()) {
      return wrong;
    }
    table->classes.push_back(one);
  }
  return "";
}

}  // namespace sq
