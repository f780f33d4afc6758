// The kernel that copies columns of x, in every dtype and instruction set.
#include "columns_checks.h"

using namespace neuroada;
using namespace neuroada::testing;

int main() {
  each_dtype([](auto element) {
    using T = decltype(element);
    for (int64_t d_in : {1, 7, 8, 31, 32, 33, 64, 200}) {
      Random random(static_cast<uint64_t>(d_in));
      for (int64_t tokens : {0, 1, 3, 40}) {
        for (int64_t draws = 0; draws < 8; ++draws) {
          check_columns<T>(tokens, d_in, draw_columns(d_in, random), 1 + random.below(5), random,
                           std::to_string(tokens) + " tokens, " + std::to_string(d_in) + " inputs");
        }
      }
    }
  });
  return exit_status();
}
