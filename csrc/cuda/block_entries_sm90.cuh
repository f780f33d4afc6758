// entry[16 g, 0] [start[b, g] .. start[b + 1, g]) = the connections of neurons 16 g .. 16 g + 15 in block b
//
// A GEMM tile over [neurons, inputs] finds its connections by these offsets. Each warp processes one block of columns
// of one group. It reads the group's columns twice, so that its output does not depend on other warps.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace neuroada::cuda {

__device__ __forceinline__ int lanes_below(unsigned lanes) { return __popc(lanes & ((1u << threadIdx.x % kWarp) - 1)); }

// blockIdx.y is the block; the one past the last writes only the end offsets.
__global__ static void block_entries_kernel(BlockEntries a) {
  const int64_t groups = (a.d_out + kGroupNeurons - 1) / kGroupNeurons;
  const int64_t group = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp;
  if (group >= groups) return;
  const int64_t base = group * kGroupNeurons * a.k;
  const int64_t all = (a.d_out - group * kGroupNeurons) * a.k;
  const int64_t count = all < kGroupNeurons * a.k ? all : kGroupNeurons * a.k;
  const int64_t first = blockIdx.y * a.width, end = first + a.width < a.d_in ? first + a.width : a.d_in;
  const int lane = threadIdx.x % kWarp;
  int32_t at = 0;
  for (int64_t i = lane; i - lane < count; i += kWarp) {
    const int32_t column = i < count ? a.index[base + i] : -1;
    at += __popc(__ballot_sync(kAllLanes, column >= 0 && column < first && column < a.d_in));
  }
  if (lane == 0) a.start[blockIdx.y * groups + group] = at;
  for (int64_t i = lane; i - lane < count; i += kWarp) {
    const int32_t column = i < count ? a.index[base + i] : -1;
    const bool inside = column >= first && column < end;
    const unsigned lanes = __ballot_sync(kAllLanes, inside);
    if (inside) {
      const auto row = static_cast<uint32_t>(i) / static_cast<uint32_t>(a.k);
      a.entry[base + at + lanes_below(lanes)] = {static_cast<int32_t>(base + i), static_cast<uint16_t>(column - first),
                                                 static_cast<uint16_t>(row)};
    }
    at += __popc(lanes);
  }
}

}  // namespace neuroada::cuda
