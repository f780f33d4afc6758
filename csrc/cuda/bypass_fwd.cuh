// out[t, j] = base[t, j] + bias[j] + sum_s delta[j, s] x[t, index[j, s]]
//
// x [tokens, d_in], index and delta [d_out, k], base and out [tokens, d_out], bias [d_out]. A CTA
// stages a block of tokens as [column][V tokens] and every lane is a neuron: a gather is one 16-byte
// read of shared memory, and out is written along the neurons.
#pragma once

#include "kernels.h"
#include "staging.cuh"

namespace neuroada::cuda {

struct BypassFwdLaunch {
  BypassFwd problem;
  Tiles tiles;
  int64_t neurons_a_part;
  bool slot_vectors;
};

// What the columns of one tile add to the bypass of neuron j.
template <class T, int kGroups>
__device__ __forceinline__ void add_bypass(float (&sum)[kGroups * kTokens<T>], const BypassFwdLaunch& a,
                                           const Quad* tile, int64_t j, int32_t first) {
  const int64_t k = a.problem.k;
  for (int64_t s = 0; s < k; s += kSlots) {
    int32_t column[kSlots];
    float delta[kSlots];
    load_slots(a.problem.index + j * k + s, k - s, a.slot_vectors, -1, column);
    load_slots(a.problem.delta + j * k + s, k - s, a.slot_vectors, 0.0f, delta);
    NEUROADA_UNROLL
    for (int q = 0; q < kSlots; ++q) {
      bool inside;
      const int at = place_in_tile(a.tiles, column[q], first, inside);
      add_column<T, kGroups>(sum, inside ? delta[q] : 0.0f, tile, a.tiles, at);
    }
  }
}

template <class T, int kGroups>
__device__ __forceinline__ void write_neuron(const float (&sum)[kGroups * kTokens<T>], const BypassFwd& p, int64_t t,
                                             int64_t j) {
  const float bias = p.bias ? to_float(static_cast<const T*>(p.bias)[j]) : 0.0f;
  NEUROADA_UNROLL
  for (int v = 0; v < kGroups * kTokens<T>; ++v) {
    if (t + v >= p.tokens) break;
    float value = sum[v] + bias;
    if (p.base) value += to_float(static_cast<const T*>(p.base)[(t + v) * p.base_stride + j]);
    static_cast<T*>(p.out)[(t + v) * p.out_stride + j] = round_to<T>(value);
  }
}

template <class T, int kGroups>
__global__ void __launch_bounds__(kMaxThreads, 1) bypass_fwd_kernel(BypassFwdLaunch a) {
  Quad* tile = shared_quads();
  const BypassFwd& p = a.problem;
  const int64_t t = int64_t{blockIdx.x} * (kGroups * kTokens<T>);
  const int64_t begin = blockIdx.y * a.neurons_a_part;
  const int64_t end = begin + a.neurons_a_part < p.d_out ? begin + a.neurons_a_part : p.d_out;
  for (int64_t block = begin; block < end; block += blockDim.x) {
    const int64_t j = block + threadIdx.x;
    float sum[kGroups * kTokens<T>] = {};
    for (int32_t first = 0; first < a.tiles.columns; first += a.tiles.width) {
      if (block == begin || !a.tiles.single()) {
        stage<T, kGroups>(tile, a.tiles, static_cast<const T*>(p.x), p.x_stride, p.tokens, t, first);
      }
      if (j < end) add_bypass<T, kGroups>(sum, a, tile, j, first);
    }
    if (j < end) write_neuron<T, kGroups>(sum, p, t, j);
  }
}

}  // namespace neuroada::cuda
