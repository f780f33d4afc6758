// The lowest and the highest of some integers: what an index or a plan is checked by, at each call.
#include <algorithm>

#include "entry.h"

namespace neuroada::cpu::NEUROADA_ISA {

Bounds bounds(const int32_t* values, int64_t count) {
  // Locals: of the members of what is returned gcc takes one value after the other.
  int32_t lowest = Bounds().lowest, highest = Bounds().highest;
  for (int64_t i = 0; i < count; ++i) {
    lowest = std::min(lowest, values[i]);
    highest = std::max(highest, values[i]);
  }
  return {lowest, highest};
}

}  // namespace neuroada::cpu::NEUROADA_ISA
