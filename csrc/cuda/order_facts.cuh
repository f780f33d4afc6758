// The order that a plan may hold: of the columns, as the lanes of the dx kernels process them, and of each column's
// entries. It depends on the index and on the kernel's tiling, not on delta, so it is computed once, and each call
// writes its connections in that order.
#pragma once

#include "column_entries.cuh"
#include "plan.cuh"

namespace neuroada::cuda {

static_assert(kOrderWindow == kWindow, "a plan has room for the columns of whole windows");

// The parameters of an order, stored in a plan before the columns. A call with other parameters sorts the columns
// again, and takes their entries in the stored order. Only with several tiles of neurons must a column's entries
// ascend, or be grouped by tiles of the call's width, as they are searched for tile boundaries. This holds: only sm_90a
// uses tiles, and its GPUs all have the same amount of shared memory, and so the same width.
struct OrderFacts {
  int32_t fact[kOrderFacts];

  // `width` is that of a tile of the neurons.
  __device__ __forceinline__ static OrderFacts of(const ColumnEntries& to, int32_t width, bool spread) {
    return {{to.window, width, to.light, spread ? 1 : 0}};
  }
  __device__ __forceinline__ bool match(const int32_t* order) const {
    bool same = true;
    NEUROADA_UNROLL
    for (int i = 0; i < kOrderFacts; ++i) same &= order[i] == fact[i];
    return same;
  }
};

// The column at a position of a plan's order, d_in if none. A column outside the window of its position, which no valid
// order has, also gives d_in.
__device__ __forceinline__ int32_t ordered_column(const int32_t* order, const ColumnEntries& to, int64_t d_in,
                                                  int32_t position) {
  const int32_t column = order[kOrderFacts + position], window = position / to.window * to.window;
  const bool inside = column >= window && column - window < to.window && column < d_in;
  return inside ? column : static_cast<int32_t>(d_in);
}

}  // namespace neuroada::cuda
