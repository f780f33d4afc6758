// The lowest and the highest of some integers: what an index or a plan is checked by, at each call.
#include <algorithm>

#include "entry.h"

namespace neuroada::cpu::NEUROADA_ISA {

Bounds bounds(const int32_t* values, int64_t count) {
  Bounds found;
  for (int64_t i = 0; i < count; ++i) {
    found.lowest = std::min(found.lowest, values[i]);
    found.highest = std::max(found.highest, values[i]);
  }
  return found;
}

}  // namespace neuroada::cpu::NEUROADA_ISA
