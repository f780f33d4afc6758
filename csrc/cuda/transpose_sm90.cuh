// to[c, t] = from[t, c]: tokens side by side, for kernels that gather whole rows from the second cache.
//
// Elements of 16 bits. A lane transposes 8 tokens of 8 columns in its registers; eight lanes of a warp
// have neighbouring tokens and four neighbouring columns, so that both sides move in whole sectors.
#pragma once

#include "kernels.h"
#include "staging.cuh"

namespace neuroada::cuda {

constexpr int kTransposeTokens = 64, kTransposeColumns = 32;  // of a warp

template <class T>
__global__ void __launch_bounds__(kMaxThreads) transpose_kernel(Transpose a) {
  constexpr int V = kTokens<T>;
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  const int64_t t = int64_t{blockIdx.x} * kTransposeTokens + lane % 8 * V;
  const int64_t c = (int64_t{blockIdx.y} * warps + threadIdx.x / kWarp) * kTransposeColumns + lane / 8 * V;
  if (t >= a.tokens || c >= a.columns) return;
  const T* from = static_cast<const T*>(a.from) + t * a.from_stride + c;
  T* to = static_cast<T*>(a.to) + c * a.to_stride + t;
  Quad row[V];
  NEUROADA_UNROLL
  for (int v = 0; v < V; ++v) row[v] = t + v < a.tokens ? load16(from + v * a.from_stride) : Quad{};
  NEUROADA_UNROLL
  for (int q = 0; q < V; ++q) store16(to + q * a.to_stride, transposed<T>(row, q));
}

}  // namespace neuroada::cuda
