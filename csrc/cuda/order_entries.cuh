// ordered[i] = (neuron, delta) of the plan's i-th connection
//
// The transposed products read it once a block of tokens, in order, where delta itself would be gathered
// and its neuron be divided out.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace neuroada::cuda {

struct OrderLaunch {
  const int32_t* entry;  // [live]
  const float* delta;    // [entries]
  WeightedNeuron* ordered;
  int64_t live;
  uint32_t entries, k;
};

// What is no entry becomes neuron -1.
__global__ static void order_entries_kernel(OrderLaunch a) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= a.live) return;
  const uint32_t e = static_cast<uint32_t>(a.entry[i]);
  a.ordered[i] = e < a.entries ? WeightedNeuron{static_cast<int32_t>(e / a.k), a.delta[e]} : WeightedNeuron{-1, 0};
}

}  // namespace neuroada::cuda
