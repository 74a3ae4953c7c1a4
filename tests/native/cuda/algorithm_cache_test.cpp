// What is remembered of a library that chooses algorithms: its choice, that it has none, and that it ran none after all.
#include "cuda/compute/algorithm_cache.h"

#include "native/testing.h"

namespace {

using namespace sq;

struct Library {
  AlgorithmCache<int, int> known;
  int asked = 0, ran = 0;

  bool multiply(int product, bool has_algorithm, bool will_run) {
    const auto ask = [&] {
      ++asked;
      return has_algorithm ? std::optional<int>(10 * product) : std::nullopt;
    };
    const auto run = [&](int algorithm) {
      ++ran;
      CHECK(algorithm == 10 * product, "the algorithm of another product");
      return will_run;
    };
    return known.run(product, ask, run);
  }
};

void test_a_choice() {
  Library library;
  for (int times = 1; times <= 3; ++times) {
    CHECK(library.multiply(1, true, true), "computed");
    CHECK(library.asked == 1 && library.ran == times, "%d, %d", library.asked, library.ran);
  }
  CHECK(library.multiply(2, true, true) && library.asked == 2, "another product is another question");
}

void test_no_algorithm() {
  Library library;
  for (int times = 0; times < 3; ++times) CHECK(!library.multiply(1, false, true), "there is none");
  CHECK(library.asked == 1 && library.ran == 0, "%d, %d", library.asked, library.ran);
}

void test_an_algorithm_that_is_not_run() {
  Library library;
  for (int times = 0; times < 3; ++times) CHECK(!library.multiply(1, true, false), "not supported");
  CHECK(library.asked == 1 && library.ran == 1, "%d, %d", library.asked, library.ran);
  CHECK(library.multiply(2, true, true), "others are");
  CHECK(!library.multiply(1, true, true), "and it stays so");
}

void test_ever_new_products() {
  Library library;
  for (int product = 0; product < 10000; ++product) CHECK(library.multiply(product, true, true), "%d", product);
  CHECK(library.asked == 10000, "each once");
  CHECK(library.multiply(0, true, true) && library.asked == 10001, "the oldest is forgotten");
}

}  // namespace

int main() {
  test_a_choice();
  test_no_algorithm();
  test_an_algorithm_that_is_not_run();
  test_ever_new_products();
}
