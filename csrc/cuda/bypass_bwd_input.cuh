// out[t, c] = sum over (j, s) with index[j, s] = c of delta[j, s] grad[t, j]
//
// grad [tokens, d_out], delta [d_out, k], out [tokens, d_in], all of it written. A CTA stages a block
// of tokens of grad as [neuron][V tokens] and each warp has columns of about equal work, by the plan's
// splits. A lane sums a light column alone; at a heavy one, which hundreds of neurons may have chosen,
// the whole warp sums, and adds its lanes' sums in a fixed order.
#pragma once

#include "kernels.h"
#include "neuroada/planner.h"
#include "plan.cuh"
#include "staging.cuh"

namespace neuroada::cuda {

constexpr int kLight = 32;  // entries up to which a column is light

struct BypassBwdInputLaunch {
  BypassBwdInput problem;
  Tiles tiles;  // of the neurons
};

// The columns [begin, end) of one of `parts` parts of equal work, at most kSplits.
struct Columns {
  int32_t begin, end;
};

__device__ __forceinline__ int32_t split_of(const BypassBwdInput& p, int64_t part, int64_t parts) {
  const int32_t column = p.plan[p.d_in + 1 + kSplits * part / parts];
  return column < 0 ? 0 : column < p.d_in ? column : static_cast<int32_t>(p.d_in);
}

__device__ __forceinline__ Columns columns_of(const BypassBwdInput& p, int64_t part, int64_t parts) {
  return {split_of(p, part, parts), split_of(p, part + 1, parts)};
}

// Rounds of 32 columns; where all warps of the CTA stage tiles together, those of the busiest.
__device__ __forceinline__ int32_t rounds_of(const BypassBwdInputLaunch& a, Columns own) {
  int32_t longest = own.end - own.begin;
  const int64_t warps = blockDim.x / kWarp, parts = gridDim.y * warps;
  for (int64_t warp = 0; !a.tiles.single() && warp < warps; ++warp) {
    const Columns other = columns_of(a.problem, blockIdx.y * warps + warp, parts);
    longest = longest < other.end - other.begin ? other.end - other.begin : longest;
  }
  return (longest + kWarp - 1) / kWarp;
}

// Entries begin, begin + step and so on, as far as their neurons are in the staged tile.
template <class T, int kGroups>
__device__ __forceinline__ void add_entries(float (&sum)[kGroups * kTokens<T>], const BypassBwdInputLaunch& a,
                                            const Quad* tile, int32_t first, int32_t begin, int32_t end, int32_t step) {
  for (int32_t i = begin; i < end; i += step) {
    const WeightedNeuron entry = a.problem.ordered[i];
    bool inside;
    const int at = place_in_tile(a.tiles, entry.neuron, first, inside);
    add_column<T, kGroups>(sum, inside ? entry.delta : 0.0f, tile, a.tiles, at);
  }
}

// The sum over all lanes of each of N values, to all of them. Halves of the values change places first,
// so that N values cost N shuffles and not 5 N; the order of the additions is that of a tree.
template <int N>
__device__ __forceinline__ void sum_over_warp(float (&values)[N], int lane) {
  static_assert(N <= kWarp && (N & (N - 1)) == 0);
  int kept = N;
  NEUROADA_UNROLL
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const bool upper = lane & offset;
    if (kept > 1) {
      kept /= 2;
      NEUROADA_UNROLL
      for (int i = 0; i < N / 2; ++i) {
        if (i >= kept) break;
        const float sent = upper ? values[i] : values[i + kept];
        const float mine = upper ? values[i + kept] : values[i];
        values[i] = mine + __shfl_xor_sync(kAllLanes, sent, offset);
      }
    } else {
      values[0] += __shfl_xor_sync(kAllLanes, values[0], offset);
    }
  }
  const float total = values[0];  // of value lane * N / 32
  NEUROADA_UNROLL
  for (int i = 0; i < N; ++i) values[i] = __shfl_sync(kAllLanes, total, i * (kWarp / N));
}

// Adds the entries [begin, end) of every lane's column, in the staged tile, to its sums.
template <class T, int kGroups>
__device__ __forceinline__ void add_columns(float (&sum)[kGroups * kTokens<T>], const BypassBwdInputLaunch& a,
                                            const Quad* tile, int32_t first, int32_t begin, int32_t end) {
  constexpr int N = kGroups * kTokens<T>;
  const int lane = threadIdx.x % kWarp;
  const bool heavy = end - begin > kLight;
  if (!heavy) add_entries<T, kGroups>(sum, a, tile, first, begin, end, 1);
  for (unsigned left = __ballot_sync(kAllLanes, heavy); left != 0; left &= left - 1) {
    const int owner = __ffs(static_cast<int>(left)) - 1;
    const int32_t from = __shfl_sync(kAllLanes, begin, owner), to = __shfl_sync(kAllLanes, end, owner);
    float shared[N] = {};
    add_entries<T, kGroups>(shared, a, tile, first, from + lane, to, kWarp);
    sum_over_warp(shared, lane);
    NEUROADA_UNROLL
    for (int v = 0; v < N; ++v) sum[v] += lane == owner ? shared[v] : 0.0f;
  }
}

template <class T, int N>
__device__ __forceinline__ void write_column(const float (&sum)[N], const BypassBwdInput& p, int64_t t, int64_t c) {
  T* out = static_cast<T*>(p.out) + t * p.out_stride + c;
  NEUROADA_UNROLL
  for (int v = 0; v < N; ++v, out += p.out_stride) {
    if (t + v < p.tokens) *out = round_to<T>(sum[v]);
  }
}

template <class T, int kGroups>
__global__ void __launch_bounds__(kMaxThreads, 1) bypass_bwd_input_kernel(BypassBwdInputLaunch a) {
  constexpr int N = kGroups * kTokens<T>;
  Quad* tile = shared_quads();
  const BypassBwdInput& p = a.problem;
  const T* grad = static_cast<const T*>(p.grad);
  const int64_t t = int64_t{blockIdx.x} * N;
  const int64_t warps = blockDim.x / kWarp;
  const Columns own = columns_of(p, blockIdx.y * warps + threadIdx.x / kWarp, gridDim.y * warps);
  if (a.tiles.single()) stage<T, kGroups>(tile, a.tiles, grad, p.grad_stride, p.tokens, t, 0);
  const int32_t rounds = rounds_of(a, own);
  for (int32_t round = 0; round < rounds; ++round) {
    const int64_t c = int64_t{own.begin} + round * kWarp + threadIdx.x % kWarp;
    const bool mine = c < own.end;
    const int32_t live = static_cast<int32_t>(p.live);
    const int32_t begin = mine ? start_of_column(p.plan, live, c) : 0;
    const int32_t end = mine ? start_of_column(p.plan, live, c + 1) : 0;
    float sum[N] = {};
    for (int32_t first = 0; first < a.tiles.columns; first += a.tiles.width) {
      if (!a.tiles.single()) stage<T, kGroups>(tile, a.tiles, grad, p.grad_stride, p.tokens, t, first);
      add_columns<T, kGroups>(sum, a, tile, first, begin, end);
    }
    if (mine) write_column<T, N>(sum, p, t, c);
  }
}

}  // namespace neuroada::cuda
