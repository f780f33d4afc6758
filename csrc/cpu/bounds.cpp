// The minimum and maximum of an int32 array, for the range check of an index or a plan at each call.
#include <algorithm>

#include "entry.h"

namespace neuroada::cpu::NEUROADA_ISA {

Bounds bounds(const int32_t* values, int64_t count) {
  // Local variables: GCC does not vectorize this loop over members of the result.
  int32_t lowest = Bounds().lowest, highest = Bounds().highest;
  for (int64_t i = 0; i < count; ++i) {
    lowest = std::min(lowest, values[i]);
    highest = std::max(highest, values[i]);
  }
  return {lowest, highest};
}

}  // namespace neuroada::cpu::NEUROADA_ISA
