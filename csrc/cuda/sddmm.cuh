// out[j, s] = sum_t grad[t, j] x[t, index[j, s]]
//
// grad [tokens, d_out], x [tokens, d_in], index and out [d_out, k]. A CTA stages block after block of
// x as [column][V tokens]; every lane is a neuron that holds its grad of the block in registers, and
// adds to sums of its own in partial [parts, d_out, k]. No atomics: a second kernel adds the parts in
// their order, so that the result is the same in every run.
#pragma once

#include "kernels.h"
#include "staging.cuh"

namespace neuroada::cuda {

struct SddmmLaunch {
  Sddmm problem;
  Tiles tiles;
  int64_t blocks;  // of tokens
  int64_t neurons_a_part;
  float* partial;  // [gridDim.y, d_out, k]
  bool slot_vectors;
};

// grad[t .. t + V groups, j], zeros past the last token.
template <class T, int kGroups>
__device__ __forceinline__ void load_grad(float (&grad)[kGroups * kTokens<T>], const Sddmm& p, int64_t t, int64_t j) {
  NEUROADA_UNROLL
  for (int v = 0; v < kGroups * kTokens<T>; ++v) {
    grad[v] = t + v < p.tokens ? to_float(static_cast<const T*>(p.grad)[(t + v) * p.grad_stride + j]) : 0.0f;
  }
}

template <class T, int kGroups>
__device__ __forceinline__ float dot(const float (&grad)[kGroups * kTokens<T>], const Quad* tile, const Tiles& tiles,
                                     int at) {
  float sum = 0;
  NEUROADA_UNROLL
  for (int g = 0; g < kGroups; ++g) {
    const Quad quad = tile[g * tiles.stride + at];
    NEUROADA_UNROLL
    for (int v = 0; v < kTokens<T>; ++v) sum += grad[g * kTokens<T> + v] * element<T>(quad, v);
  }
  return sum;
}

// Adds the staged block to the sums of neuron j; the first block of a part sets them.
template <class T, int kGroups>
__device__ __forceinline__ void add_block(const SddmmLaunch& a, const float (&grad)[kGroups * kTokens<T>],
                                          const Quad* tile, int64_t j, int32_t first, bool set, float* partial) {
  const int64_t k = a.problem.k;
  for (int64_t s = 0; s < k; s += kSlots) {
    int32_t column[kSlots];
    float sum[kSlots] = {};
    load_slots(a.problem.index + j * k + s, k - s, a.slot_vectors, -1, column);
    if (!set) load_slots(static_cast<const float*>(partial + j * k + s), k - s, a.slot_vectors, 0.0f, sum);
    NEUROADA_UNROLL
    for (int q = 0; q < kSlots; ++q) {
      bool inside;
      const int at = place_in_tile(a.tiles, column[q], first, inside);
      const float product = dot<T, kGroups>(grad, tile, a.tiles, at);
      sum[q] += inside ? product : 0.0f;  // zeros alone would not do: grad may be infinite
    }
    if (a.slot_vectors) {
      Quad quad;
      std::memcpy(quad.word, sum, sizeof(quad));
      store16(partial + j * k + s, quad);
      continue;
    }
    NEUROADA_UNROLL
    for (int q = 0; q < kSlots; ++q) {
      if (q < k - s) partial[j * k + s + q] = sum[q];
    }
  }
}

template <class T, int kGroups>
__global__ void __launch_bounds__(kMaxThreads, 1) sddmm_kernel(SddmmLaunch a) {
  Quad* tile = shared_quads();
  const Sddmm& p = a.problem;
  const int64_t begin = blockIdx.x * a.neurons_a_part;
  const int64_t end = begin + a.neurons_a_part < p.d_out ? begin + a.neurons_a_part : p.d_out;
  const int64_t first_block = a.blocks * blockIdx.y / gridDim.y, last_block = a.blocks * (blockIdx.y + 1) / gridDim.y;
  float* partial = a.partial + blockIdx.y * p.d_out * p.k;
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t t = block * (kGroups * kTokens<T>);
    for (int32_t first = 0; first < a.tiles.columns; first += a.tiles.width) {
      stage<T, kGroups>(tile, a.tiles, static_cast<const T*>(p.x), p.x_stride, p.tokens, t, first);
      for (int64_t j = begin + threadIdx.x; j < end; j += blockDim.x) {
        float grad[kGroups * kTokens<T>];
        load_grad<T, kGroups>(grad, p, t, j);
        add_block<T, kGroups>(a, grad, tile, j, first, block == first_block && first == 0, partial);
      }
    }
  }
}

struct SumPartsLaunch {
  const float* partial;  // [parts, count]
  float* out;            // [count]
  int64_t parts, count;
};

// out[e] = sum_p partial[p, e], in the order of p.
__global__ static void sum_parts_kernel(SumPartsLaunch a) {
  const int64_t e = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (e >= a.count) return;
  float sum = 0;
  for (int64_t part = 0; part < a.parts; ++part) sum += a.partial[part * a.count + e];
  a.out[e] = sum;
}

}  // namespace neuroada::cuda
