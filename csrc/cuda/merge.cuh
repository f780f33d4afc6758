// merge:   original[j, s] = W[j, index[j, s]], then W[j, index[j, s]] = round(W + delta[j, s])
// gather:  original[j, s] = W[j, index[j, s]]
// patch:   W[j, index[j, s]] = round(original[j, s] + delta[j, s])
// restore: W[j, index[j, s]] = original[j, s]
//
// W [d_out, d_in], index, delta and original [d_out, k]. A thread processes one connection.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace neuroada::cuda {

template <class T, MergeMode kMode>
__global__ void merge_kernel(Merge p) {
  const int64_t e = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (e >= p.d_out * p.k) return;
  constexpr bool reads_weight = kMode == MergeMode::merge || kMode == MergeMode::gather;
  constexpr bool adds_delta = kMode == MergeMode::merge || kMode == MergeMode::patch;
  T* original = static_cast<T*>(p.original) + e;
  const int32_t column = p.index[e];
  if (column < 0 || column >= p.d_in) {
    if constexpr (reads_weight) *original = T{};
    return;
  }
  const int64_t j = static_cast<uint32_t>(e) / static_cast<uint32_t>(p.k);
  T* weight = static_cast<T*>(p.weight) + j * p.weight_stride + column;
  const T value = reads_weight ? *weight : *original;
  if constexpr (reads_weight) *original = value;
  if constexpr (adds_delta) *weight = round_to<T>(to_float(value) + p.delta[e]);
  if constexpr (kMode == MergeMode::restore) *weight = value;
}

}  // namespace neuroada::cuda
