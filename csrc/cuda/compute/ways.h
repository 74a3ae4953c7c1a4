// Which ways to multiply to try, in which order: what Python has ranked on this machine, or what the environment asks for.
#pragma once

#include "common/dtypes.h"
#include "cuda/compute/way_table.h"

namespace sq {

struct Ways {
  WayList list;
  bool is_forced;  // by SMOOTHQUANT_CUDA_GEMM: this one and no other
};

// For products of so many rows of a, int8 or either fp8. The variable is read anew at every call, so that tests and
// benchmarks can go through its values; fails if it has another.
Ways ways_for(const char* op, DType a, int64_t rows);

// Ranks the ways of a dtype of a, "int8" or "fp8", by a table as way_table.h reads it; for all threads at once. Fails with
// a sentence for any other, and changes nothing then.
void set_ways(const char* op, const std::string& dtype, const std::string& table);

// As ranked, whatever the environment says.
WayList ranked_ways(const char* op, const std::string& dtype, int64_t rows);

}  // namespace sq
