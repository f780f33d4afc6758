// dx of one slot, where few neurons have chosen each column: out[t, c] = sum over j with index[j] = c of delta[j]
// grad[t, j].
//
// So few products take less time than memory does to give grad and take out: grad comes through a ring of rows, and a
// lane has groups of 8 neighbouring columns, whose values of a token are one write. It holds up to kSlots connections
// of each column, straight from the plan; what a column has beyond them is in a list in shared memory.
//
// How many a column has is known here alone. Where one has far more than others, these kernels do nothing and say so,
// and the general ones, which are launched after them, take their place.
#pragma once

#include "kernels.h"
#include "neuroada/planner.h"
#include "plan.cuh"
#include "row_ring.cuh"

namespace neuroada::cuda {

// Connections in lists: of all of a CTA's columns, and of a group of 8 at most.
constexpr int kListed = 2048, kMostListed = 32;

struct BypassBwdInputRowsLaunch {
  BypassBwdInput problem;
  Ring ring;        // of grad, and 8 zeros for each row
  int32_t* served;  // whether out is written here
};

// A connection in a list: the neuron, the column of the group above it in 16 bits each.
struct ListedConnection {
  uint32_t place;
  float delta;
};

// Behind the ring.
struct ConnectionLists {
  ListedConnection* listed;  // [kListed]
  int32_t* count;            // of those, then whether there are too many

  static constexpr int64_t kBytes = kListed * sizeof(ListedConnection) + 16;

  template <class T>
  __device__ __forceinline__ static ConnectionLists behind(const Ring& ring) {
    auto* listed = reinterpret_cast<ListedConnection*>(reinterpret_cast<char*>(shared_quads()) + ring.bytes<T>());
    return {listed, reinterpret_cast<int32_t*>(listed + kListed)};
  }
};

// The connections of a group of 8 columns.
template <int kSlots>
struct ColumnGroup {
  uint32_t places[kSlots][kGroup / 2];  // neurons, 16 bits each; of none that of the zeros
  float delta[kSlots][kGroup];
  int32_t listed, count;

  // Those of columns from `first` on. Of a plan that is not one, nothing outside the arguments is read.
  __device__ __forceinline__ void load(const BypassBwdInput& p, int32_t first, const ConnectionLists& lists) {
    const int32_t live = static_cast<int32_t>(p.live);
    const int32_t* entries = p.plan + p.d_in + 1 + kSplits + 1;
    const auto start = [&](int32_t c) { return c <= p.d_in ? start_of_column(p.plan, live, c) : live; };
    const auto connection = [&](int32_t at, int32_t end) {
      const uint32_t e = at < end ? static_cast<uint32_t>(entries[at]) : UINT32_MAX;
      const bool there = e < static_cast<uint64_t>(p.d_out);
      return ListedConnection{there ? e : static_cast<uint32_t>(p.d_out), there ? p.delta[e] : 0.0f};
    };
    count = 0;
    NEUROADA_UNROLL
    for (int n = 0; n < kGroup; ++n) {
      const int32_t begin = start(first + n), end = start(first + n + 1);
      NEUROADA_UNROLL
      for (int s = 0; s < kSlots; ++s) {
        const ListedConnection one = connection(begin + s, end);
        if (n % 2 == 0) places[s][n / 2] = 0;
        places[s][n / 2] |= one.place << 16 * (n % 2);
        delta[s][n] = one.delta;
      }
      count += end - begin > kSlots ? end - begin - kSlots : 0;
    }
    listed = count > 0 ? atomicAdd(&lists.count[0], count > kMostListed ? kListed : count) : 0;
    if (count > kMostListed || (count > 0 && listed + count > kListed)) {
      atomicAdd(&lists.count[1], 1);
      return;
    }
    int32_t to = listed;
    NEUROADA_ROLLED
    for (int32_t n = 0; n < kGroup && to < listed + count; ++n) {
      const int32_t end = start(first + n + 1);
      for (int32_t at = start(first + n) + kSlots; at < end; ++at, ++to) {
        const ListedConnection one = connection(at, end);
        lists.listed[to] = {one.place | static_cast<uint32_t>(n) << 16, one.delta};
      }
    }
  }

  template <class T>
  __device__ __forceinline__ void add(float (&sum)[kGroup], const T* row, const ConnectionLists& lists) const {
    NEUROADA_UNROLL
    for (int s = 0; s < kSlots; ++s) {
      NEUROADA_UNROLL
      for (int n = 0; n < kGroup; ++n) {
        sum[n] += delta[s][n] * to_float(*in_row(row, places[s][n / 2] >> 16 * (n % 2) & 0xffff));
      }
    }
    NEUROADA_ROLLED
    for (int32_t i = 0; i < count; ++i) {
      const ListedConnection one = lists.listed[listed + i];
      const float value = one.delta * to_float(*in_row(row, one.place & 0xffff));
      NEUROADA_UNROLL
      for (int n = 0; n < kGroup; ++n) {
        if (one.place >> 16 == static_cast<uint32_t>(n)) sum[n] += value;
      }
    }
  }
};

template <class T, int kGroups, int kSlots>
__global__ void __launch_bounds__(kSlots > 2 ? kMaxThreads : 2 * kMaxThreads, 1)
    bypass_bwd_input_rows_kernel(BypassBwdInputRowsLaunch a) {
  const BypassBwdInput& p = a.problem;
  const ConnectionLists lists = ConnectionLists::behind<T>(a.ring);
  if (threadIdx.x < 2) lists.count[threadIdx.x] = 0;
  const TokenRows<T, true> tokens{a.ring,
                                  {static_cast<const T*>(p.grad), p.grad_stride, static_cast<int32_t>(p.d_out)},
                                  {},
                                  p.tokens * blockIdx.y / gridDim.y,
                                  p.tokens * (blockIdx.y + 1) / gridDim.y};
  tokens.clear_second();
  __syncthreads();
  const auto first_of = [&](int group) { return kGroup * static_cast<int32_t>(group * blockDim.x + threadIdx.x); };
  ColumnGroup<kSlots> columns[kGroups];
  NEUROADA_UNROLL
  for (int group = 0; group < kGroups; ++group) {
    columns[group].count = 0;
    if (first_of(group) < p.d_in) columns[group].load(p, first_of(group), lists);
  }
  __syncthreads();
  const bool serves = lists.count[1] == 0;  // in every CTA the same
  if (blockIdx.y == 0 && threadIdx.x == 0) *a.served = serves;
  if (!serves) return;
  tokens.start();
  T* out = static_cast<T*>(p.out);
  tokens.for_each([&](int64_t t, const T* grad, const T*) {
    NEUROADA_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      if (first_of(group) >= p.d_in) break;
      float sum[kGroup] = {};
      columns[group].add(sum, grad, lists);
      store16(in_row(out + t * p.out_stride, static_cast<uint32_t>(first_of(group))), round_group<T>(sum));
    }
  });
}

}  // namespace neuroada::cuda
