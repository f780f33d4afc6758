// What device code reads from a plan, see neuroada/planner.h: its values are bounded where they are used.
#pragma once

#include "device.cuh"

namespace neuroada::cuda {

// Where the entries of a column begin, of `live` of them.
__device__ __forceinline__ int32_t start_of_column(const int32_t* plan, int32_t live, int64_t column) {
  const int32_t start = plan[column];
  return start < 0 ? 0 : start < live ? start : live;
}

}  // namespace neuroada::cuda
