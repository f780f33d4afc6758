// The bypass of one slot, without base and bias: out[t, j] = delta[j] x[t, index[j]].
//
// With so few products the kernel is bound by memory bandwidth: x comes through a circular buffer of rows, and a lane
// has groups of 8 adjacent neurons, whose values of a token are one store.
#pragma once

#include "kernels.h"
#include "row_ring.cuh"

namespace neuroada::cuda {

struct BypassFwdRowsLaunch {
  BypassFwd problem;
  Ring ring;                 // of x
  int32_t neurons_per_part;  // a multiple of kGroup
};

// A lane has kGroups groups of neurons. In a slot without a connection, delta is not read and x may be non-finite, so
// its product is replaced by zero.
template <class T, int kGroups>
__global__ void __launch_bounds__(2 * kMaxThreads, 1) bypass_fwd_rows_kernel(BypassFwdRowsLaunch a) {
  using Columns = GroupColumns<kGroups>;
  const BypassFwd& p = a.problem;
  const NeuronPart part = NeuronPart::of_cta(a.neurons_per_part, p.d_out);
  const int64_t first_neuron = part.first;
  const int32_t neurons = part.count;
  const TokenRows<T, true> tokens{a.ring,
                                  {static_cast<const T*>(p.x), p.x_stride, static_cast<int32_t>(p.d_in)},
                                  {},
                                  p.tokens * blockIdx.y / gridDim.y,
                                  p.tokens * (blockIdx.y + 1) / gridDim.y};
  tokens.start();
  Columns columns;
  columns.load(p.index + first_neuron, neurons, p.d_in);
  float delta[kGroups][kGroup];
  uint32_t connected[kGroups] = {};  // a bit for each neuron
  NEUROADA_UNROLL
  for (int group = 0; group < kGroups; ++group) {
    NEUROADA_UNROLL
    for (int n = 0; n < kGroup; ++n) {
      const int32_t neuron = Columns::first_neuron(group) + n;
      const bool there = Columns::column_of(p.index + first_neuron, neuron, neurons, p.d_in) >= 0;
      delta[group][n] = there ? p.delta[first_neuron + neuron] : 0.0f;
      connected[group] |= uint32_t{there} << n;
    }
  }
  T* out = static_cast<T*>(p.out) + first_neuron;
  tokens.for_each([&](int64_t t, const T* x, const T*) {
    NEUROADA_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      const int32_t first = Columns::first_neuron(group);
      if (first >= neurons) break;
      float value[kGroup];
      NEUROADA_UNROLL
      for (int n = 0; n < kGroup; ++n) {
        value[n] = 0.0f + delta[group][n] * to_float(*in_row(x, columns(group, n)));  // as other kernels do
      }
      if (connected[group] != 0xff) {  // rare
        NEUROADA_UNROLL
        for (int n = 0; n < kGroup; ++n) value[n] = connected[group] >> n & 1 ? value[n] : 0.0f;
      }
      store16(in_row(out + t * p.out_stride, static_cast<uint32_t>(first)), rounded_quad<T>(value));
    }
  });
}

}  // namespace neuroada::cuda
