// out[e] = sum_p partial[p, e]: what the parts of the tokens have summed up, see sddmm.cuh.
#pragma once

#include "device.cuh"

namespace neuroada::cuda {

struct SumPartsLaunch {
  const float* partial;  // [parts, count]
  float* out;            // [count]
  int64_t parts, count;
};

// In the order of p; several are on their way at once.
__global__ static void sum_parts_kernel(SumPartsLaunch a) {
  constexpr int kAtOnce = 8;
  const int64_t e = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (e >= a.count) return;
  float sum = 0;
  for (int64_t part = 0; part < a.parts; part += kAtOnce) {
    float value[kAtOnce];
    NEUROADA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) value[i] = part + i < a.parts ? a.partial[(part + i) * a.count + e] : 0.0f;
    NEUROADA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) sum += value[i];
  }
  a.out[e] = sum;
}

}  // namespace neuroada::cuda
