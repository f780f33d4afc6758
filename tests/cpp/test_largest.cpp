// The kernel that selects connections, in every dtype and instruction set.
#include "largest_checks.h"

using namespace neuroada;
using namespace neuroada::testing;

int main() {
  each_dtype([](auto element) {
    using T = decltype(element);
    for (int64_t columns : {1, 2, 63, 64, 65, 200, 1000}) {
      Random random(static_cast<uint64_t>(columns));
      for (int64_t k : {int64_t{1}, int64_t{3}, columns / 2, columns - 1, columns}) {
        if (k < 1 || k > columns) continue;
        for (int64_t threads : {1, 5}) {
          check_largest<T>(draw_scores<T>(7, columns, random), k, threads, std::to_string(columns) + " columns");
        }
      }
    }
  });
  return exit_status();
}
