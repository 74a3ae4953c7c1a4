// Rankings of ways as text: what is read back is what was written, and every text that is wrong has a sentence.
#include "cuda/compute/way_table.h"

#include "native/testing.h"

namespace {

using namespace sq;

WayTable read(const std::string& text, bool is_fp8) {
  WayTable table;
  const std::string wrong = parse_way_table(text, is_fp8, &table);
  CHECK(wrong.empty(), "%s: %s", text.c_str(), wrong.c_str());
  return table;
}

void check_list(const WayTable& table, int64_t rows, const std::string& expected) {
  const std::string text = text_of(table.of(rows));
  CHECK(text == expected, "%" PRId64 " rows: %s, expected %s", rows, text.c_str(), expected.c_str());
}

void test_classes() {
  const WayTable table = read("1=skinny;8=mma,library;999999999999999999=wgmma;=torch,library_fast", true);
  for (int64_t rows : {0, 1}) check_list(table, rows, "skinny");
  for (int64_t rows : {2, 8}) check_list(table, rows, "mma,library");
  for (int64_t rows : {int64_t{9}, int64_t{999999999999999999}}) check_list(table, rows, "wgmma");
  check_list(table, std::numeric_limits<int64_t>::max(), "torch,library_fast");
  check_list(read("=library,library_fast,skinny,mma,wgmma,torch", true), 5,
             "library,library_fast,skinny,mma,wgmma,torch");
}

void test_unmeasured() {
  for (bool is_fp8 : {false, true}) {
    const WayTable table = read(kUnmeasuredTable, is_fp8);
    for (int64_t rows : {1, 8}) check_list(table, rows, "skinny,library,torch");
    for (int64_t rows : {9, 100000}) check_list(table, rows, "library,skinny,torch");
  }
}

void test_what_is_wrong() {
  const std::string texts[] = {"",
                               ";",
                               "=",
                               "library",
                               "=library;",
                               "=library,",
                               "=,library",
                               "=Library",
                               "= library",
                               "=library,library",
                               "=torch,mma,torch",
                               "8=library",
                               "=library;=torch",
                               "x=library;=torch",
                               "+8=library;=torch",
                               "0=library;=torch",
                               "1e3=library;=torch",
                               "1000000000000000000=library;=torch",
                               "8=library;8=mma;=torch",
                               "8=library;7=mma;=torch",
                               "8=library;=torch;9=mma",
                               "8=lib=rary;=torch"};
  for (const std::string& text : texts) {
    for (bool is_fp8 : {false, true}) {
      WayTable table;
      CHECK(!parse_way_table(text, is_fp8, &table).empty(), "%s", text.c_str());
    }
  }
  WayTable table;
  CHECK(!parse_way_table("=library_fast", false, &table).empty(), "int8 has no fast accumulation");
}

}  // namespace

int main() {
  for (int i = 0; i < kWayCount; ++i) CHECK(way_named(kWayNames[i]) == static_cast<Way>(i), "%s", kWayNames[i]);
  test_classes();
  test_unmeasured();
  test_what_is_wrong();
}
