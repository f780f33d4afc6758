// The plan's connections as dx's kernel reads them. Within windows of 64 columns those with the most connections
// come first, so that the lanes of a warp, which has 32 columns at a time, are done at about the same time; of these
// the i-th connections lie side by side, two at a time, so that the lanes load theirs together.
//
// A column of more than `light` connections is heavy: it has its own in a row, for a warp to read together.
#pragma once

#include "kernels.h"
#include "neuroada/planner.h"
#include "plan.cuh"
#include "staging.cuh"

namespace neuroada::cuda {

constexpr int kWindow = 2 * kWarp;

// The column at a position of the order, d_in where there is none, and how many connections it has.
struct alignas(8) OrderedColumn {
  int32_t column, count;
};
static_assert(sizeof(OrderedColumn) == sizeof(WeightedNeuron));

// Where what lies in the scratch: columns in order, connections of the light ones, and those of the heavy ones as
// in the plan.
struct ColumnEntries {
  WeightedNeuron* scratch;
  int64_t positions;  // of columns, whole windows
  int32_t light;      // even

  __host__ __device__ static int64_t positions_of(int64_t d_in) { return (d_in + kWindow - 1) / kWindow * kWindow; }
  __host__ __device__ static int64_t size(int64_t d_in, int64_t live, int32_t light) {
    return positions_of(d_in) * (1 + light) + live;
  }
  __device__ __forceinline__ OrderedColumn* column(uint32_t position) const {
    return in_row(reinterpret_cast<OrderedColumn*>(scratch), position);
  }
  // Where connection i of a light column lies, i even; the next is beside it, the next two 2 kWarp further on.
  __device__ __forceinline__ uint32_t two(uint32_t position, uint32_t i) const {
    const uint32_t first = static_cast<uint32_t>(positions);
    return first + position / kWarp * (kWarp * static_cast<uint32_t>(light)) + i * kWarp + position % kWarp * 2;
  }
  __device__ __forceinline__ uint32_t heavy(uint32_t i) const {
    return static_cast<uint32_t>(positions) * static_cast<uint32_t>(1 + light) + i;
  }
};

struct ColumnEntriesLaunch {
  ColumnEntries to;
  const int32_t* plan;
  const float* delta;  // [entries]
  int64_t d_in, live;
  uint32_t entries, k;
  int32_t absent;  // what stands for a neuron where there is no connection
  bool places;     // of the tile that has all neurons, instead of neurons
};

// How many of the window's columns come before the lane's own two: those with more connections, and of as many
// those further left. `key` are the lane's columns, `lane` and `lane + 32` of the window.
__device__ __forceinline__ void rank_columns(const int32_t (&key)[2], int (&rank)[2]) {
  const int lane = threadIdx.x % kWarp;
  rank[0] = rank[1] = 0;
  NEUROADA_ROLLED
  for (int other = 0; other < kWarp; ++other) {
    const int32_t left = __shfl_sync(kAllLanes, key[0], other), right = __shfl_sync(kAllLanes, key[1], other);
    rank[0] += (left > key[0] || (left == key[0] && other < lane)) + (right > key[0]);
    rank[1] += (left >= key[1]) + (right > key[1] || (right == key[1] && other < lane));
  }
}

// A CTA has a window, and a warp every so many-th connection of its columns. What is no entry adds nothing.
__global__ static void column_entries_kernel(ColumnEntriesLaunch a) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t window = int64_t{blockIdx.x} * kWindow;
  const int32_t live = static_cast<int32_t>(a.live);
  int32_t begin[2], count[2], key[2];
  int rank[2];
  NEUROADA_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int64_t column = window + h * kWarp + lane;
    begin[h] = column < a.d_in ? start_of_column(a.plan, live, column) : 0;
    count[h] = column < a.d_in ? start_of_column(a.plan, live, column + 1) - begin[h] : -1;  // what is none comes last
    key[h] = count[h] > a.to.light ? 0 : count[h];
  }
  rank_columns(key, rank);
  const int32_t* entry = a.plan + a.d_in + 1 + kSplits + 1;
  NEUROADA_UNROLL
  for (int h = 0; h < 2; ++h) {
    const uint32_t position = static_cast<uint32_t>(window + rank[h]);
    const int64_t column = window + h * kWarp + lane;
    const bool heavy = count[h] > a.to.light;
    if (warp == 0) *a.to.column(position) = {static_cast<int32_t>(column < a.d_in ? column : a.d_in), count[h]};
    const int32_t padded = heavy || count[h] < 0 ? count[h] : count[h] + count[h] % 2;
    for (int32_t i = warp; i < padded; i += warps) {
      const uint32_t e = i < count[h] ? static_cast<uint32_t>(entry[begin[h] + i]) : a.entries;
      const bool there = e < a.entries;
      const int32_t neuron = static_cast<int32_t>(e / a.k);
      const uint32_t at = heavy ? a.to.heavy(begin[h] + i) : a.to.two(position, i - i % 2) + i % 2;
      a.to.scratch[at] = {there ? (a.places ? place(neuron) : neuron) : a.absent, there ? a.delta[e] : 0.0f};
    }
  }
}

}  // namespace neuroada::cuda
