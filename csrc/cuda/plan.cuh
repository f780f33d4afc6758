// Device-side access to a plan (neuroada/planner.h). Its values are unchecked, and bounded where they are used.
#pragma once

#include "device.cuh"
#include "neuroada/planner.h"

namespace neuroada::cuda {

__device__ __forceinline__ const int32_t* order_of_plan(const int32_t* plan, int64_t d_in) {
  return plan + d_in + 1 + kSplits + 1;
}

__device__ __forceinline__ const int32_t* entries_of_plan(const int32_t* plan, int64_t d_in) {
  return order_of_plan(plan, d_in) + kOrderFacts + (d_in + kOrderWindow - 1) / kOrderWindow * kOrderWindow;
}

// Index of the first entry of `column`, clamped to [0, live].
__device__ __forceinline__ int32_t start_of_column(const int32_t* plan, int32_t live, int64_t column) {
  const int32_t start = plan[column];
  return start < 0 ? 0 : start < live ? start : live;
}

}  // namespace neuroada::cuda
