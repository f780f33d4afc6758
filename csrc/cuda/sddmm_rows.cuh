// SDDMM of one slot: out[j] = sum_t grad[t, j] x[t, index[j]].
//
// With so few products the kernel is bound by memory bandwidth: x and grad come through a circular buffer of rows. A
// lane has groups of 8 adjacent neurons, whose grad of a token is one read; it reads x value by value. Each connection
// is summed over the tokens in their order, wherever its rows are read from.
#pragma once

#include "kernels.h"
#include "row_ring.cuh"

namespace neuroada::cuda {

struct SddmmRowsLaunch {
  Sddmm problem;
  Ring ring;                 // of x and grad
  int32_t neurons_per_part;  // a multiple of kGroup
  bool vectors;              // groups of 8 values of grad are aligned
  float* partial;            // [gridDim.y, d_out]
};

// 8 adjacent values of a row, zeros past the last.
template <class T>
__device__ __forceinline__ void load_group(float (&value)[kGroup], const T* row, int32_t first, int32_t end,
                                           bool vectors) {
  if (vectors && first + kGroup <= end) {
    const Quad quad = load16(row + first);
    NEUROADA_UNROLL
    for (int n = 0; n < kGroup; ++n) value[n] = element<T>(quad, n);
    return;
  }
  NEUROADA_UNROLL
  for (int n = 0; n < kGroup; ++n) value[n] = first + n < end ? to_float(row[first + n]) : 0.0f;
}

// A lane has kGroups groups of neurons.
template <class T, int kGroups, bool kBulk>
__global__ void __launch_bounds__(kMaxThreads, 1) sddmm_rows_kernel(SddmmRowsLaunch a) {
  using Columns = GroupColumns<kGroups>;
  const Sddmm& p = a.problem;
  const NeuronPart part = NeuronPart::of_cta(a.neurons_per_part, p.d_out);
  const int64_t first_neuron = part.first;
  const int32_t neurons = part.count;
  const TokenRows<T, kBulk> tokens{a.ring,
                                   {static_cast<const T*>(p.x), p.x_stride, static_cast<int32_t>(p.d_in)},
                                   {static_cast<const T*>(p.grad) + first_neuron, p.grad_stride, neurons},
                                   p.tokens * blockIdx.y / gridDim.y,
                                   p.tokens * (blockIdx.y + 1) / gridDim.y};
  tokens.start();
  Columns columns;
  columns.load(p.index + first_neuron, neurons, p.d_in);
  float sum[kGroups][kGroup] = {};
  tokens.for_each([&](int64_t, const T* x, const T* grad) {
    NEUROADA_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      if (Columns::first_neuron(group) >= neurons) break;
      float value[kGroup];
      load_group<T>(value, grad, Columns::first_neuron(group), neurons, a.vectors);
      NEUROADA_UNROLL
      for (int n = 0; n < kGroup; ++n) sum[group][n] += value[n] * to_float(*in_row(x, columns(group, n)));
    }
  });
  float* partial = a.partial + blockIdx.y * p.d_out + first_neuron;
  NEUROADA_UNROLL
  for (int group = 0; group < kGroups; ++group) {
    NEUROADA_UNROLL
    for (int n = 0; n < kGroup; ++n) {
      const int32_t neuron = Columns::first_neuron(group) + n;
      if (neuron >= neurons) break;
      const bool connected = Columns::column_of(p.index + first_neuron, neuron, neurons, p.d_in) >= 0;
      partial[neuron] = connected ? sum[group][n] : 0.0f;
    }
  }
}

}  // namespace neuroada::cuda
