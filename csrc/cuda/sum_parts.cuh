// out[e] = sum_p partial[p, e]: adds the sums of the parts of the tokens, see sddmm.cuh.
#pragma once

#include "device.cuh"

namespace neuroada::cuda {

// A CTA computes 32 sums, and each of its warps adds some of their parts: with one thread per sum, the few threads
// would mostly wait for memory.
constexpr int kSumPartsThreads = 256;

struct SumPartsLaunch {
  const float* partial;  // [parts, count]
  float* out;            // [count]
  int64_t parts, count;
};

// Each warp adds its parts in the order of p, with several loads in flight; warp 0 then adds the warps' sums in order.
__global__ static void sum_parts_kernel(SumPartsLaunch a) {
  constexpr int kAtOnce = 8;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  float* of_warps = reinterpret_cast<float*>(shared_quads());
  const int64_t e = int64_t{blockIdx.x} * kWarp + lane, end = a.parts * (warp + 1) / warps;
  float sum = 0;
  for (int64_t part = a.parts * warp / warps; part < end && e < a.count; part += kAtOnce) {
    float value[kAtOnce];
    NEUROADA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) value[i] = part + i < end ? a.partial[(part + i) * a.count + e] : 0.0f;
    NEUROADA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) sum += value[i];
  }
  of_warps[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || e >= a.count) return;
  for (int other = 1; other < warps; ++other) sum += of_warps[other * kWarp + lane];
  a.out[e] = sum;
}

}  // namespace neuroada::cuda
