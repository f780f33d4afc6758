// The minimum and maximum of an int32 array, at any position, in every instruction set.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "guarded.h"
#include "run_cpu.h"

using namespace neuroada;
using namespace neuroada::testing;

int main() {
  each_isa([](const cpu::Kernels& kernels) {
    for (int64_t count = 0; count < 70; ++count) {
      std::vector<int32_t, GuardedAllocator<int32_t>> values(static_cast<size_t>(count), 7);
      const std::string where = std::string(kernels.isa) + ", bounds of " + std::to_string(count);
      const auto are = [&](int32_t lowest, int32_t highest) {
        const cpu::Bounds found = kernels.bounds(values.data(), count);
        return found.lowest == lowest && found.highest == highest;
      };
      CHECK(count == 0 ? are(INT32_MAX, INT32_MIN) : are(7, 7), where);
      for (int64_t at = 0; at < count; ++at) {
        for (const int32_t value : {INT32_MIN, -1, 0, 8, INT32_MAX}) {
          values[at] = value;
          const bool alone = count == 1;
          CHECK(are(alone ? value : std::min(value, 7), alone ? value : std::max(value, 7)),
                where + ", " + std::to_string(value) + " at " + std::to_string(at));
        }
        values[at] = 7;
      }
    }
  });
  return exit_status();
}
