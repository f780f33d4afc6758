// The order that a plan may hold: the columns as dx's kernel has them side by side, and each column's entries as it
// reads them. It hangs on the index and on what the kernel is fitted to, not on delta: so it is found once, and a call
// writes its connections by it.
#pragma once

#include "column_entries.cuh"
#include "plan.cuh"

namespace neuroada::cuda {

static_assert(kOrderWindow == kWindow, "a plan has room for the columns of whole windows");

// What an order is for, as a plan names it in front of the columns. A call that it is not for sorts the columns anew,
// and takes their entries in whatever order they are. Only if it has several tiles of the neurons must a column's
// entries rise, or come tile by tile in the call's own width, where they are searched for borders. They do: tiles are
// cut on sm_90a alone, whose GPUs all have as much shared memory, and so the same width.
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

// The column at a position of a plan's order, d_in where there is none: what lies outside the window of its position,
// which no order has, is none either.
__device__ __forceinline__ int32_t ordered_column(const int32_t* order, const ColumnEntries& to, int64_t d_in,
                                                  int32_t position) {
  const int32_t column = order[kOrderFacts + position], window = position / to.window * to.window;
  const bool inside = column >= window && column - window < to.window && column < d_in;
  return inside ? column : static_cast<int32_t>(d_in);
}

}  // namespace neuroada::cuda
