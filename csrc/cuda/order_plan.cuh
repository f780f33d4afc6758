// Writes the order in which dx reads a plan into a copy of it, once for all later calls: columns and tiles as in
// column_entries_kernel, and the connections of light columns so that the lanes of an octet, which shared memory serves
// together, have as few bank conflicts as possible.
#pragma once

#include "match_banks.cuh"
#include "order_columns.cuh"

namespace neuroada::cuda {

struct OrderPlanLaunch {
  ColumnEntriesLaunch entries;  // without deltas
  int32_t* out;                 // a copy of the plan

  int64_t bytes(int64_t threads) const {
    constexpr int64_t kOctets = kWindow / kBanks;
    return entries.bytes(threads) + (entries.spread ? kOctets * kBanks * kBanks * int64_t{sizeof(uint16_t)} : 0);
  }
};

// One warp matches the lanes of an octet with banks, step by step, and stores the bank of each step in turns.turn.
__device__ __forceinline__ void match_octet(const SortedColumns& columns, int octet, int32_t light, const Turns& turns,
                                            uint16_t (*left)[kBanks]) {
  const int lane = threadIdx.x % kWarp;
  const auto count_of = [&](int of) {
    const int32_t count = columns.of[octet * kBanks + of].count();
    return count <= light ? count : 0;
  };
  if (lane < kBanks) {
    for (int b = 0; b < kBanks; ++b) left[lane][b] = 0;
    const uint16_t* const bank = turns.bank + octet * kBanks + lane;
    for (int32_t i = 0; i < count_of(lane); ++i) ++left[lane][bank[i * kWindow]];
  }
  __syncwarp();
  if (lane == 0) {
    Octet lanes{left};
    int32_t steps = 0;
    for (int of = 0; of < kBanks; ++of) steps = steps < count_of(of) ? count_of(of) : steps;
    for (int32_t step = 0; step < steps; ++step) {
      uint32_t active = 0;
      for (int of = 0; of < kBanks; ++of) active |= step < count_of(of) ? 1u << of : 0;
      lanes.choose(active, steps - step);
      lanes.take(active);
      for (uint32_t rest = active; rest != 0; rest &= rest - 1) {
        const int of = first_in(rest);
        turns.turn[step * kWindow + octet * kBanks + of] = static_cast<uint16_t>(lanes.choice[of]);
      }
    }
  }
  __syncwarp();
}

// The step in which a column's connection i is read: a bank's n-th connection is read when the bank is chosen the n-th
// time.
__device__ __forceinline__ int32_t step_of(const Turns& turns, int at, int32_t i, int32_t count) {
  const uint16_t own = turns.bank[i * kWindow + at];
  int32_t before = 0, step = 0;
  for (int32_t other = 0; other < i; ++other) before += turns.bank[other * kWindow + at] == own;
  for (; step < count; ++step) {
    if (turns.turn[step * kWindow + at] == own && before-- == 0) break;
  }
  return step;
}

// A CTA processes kWindow positions and one tile of the neurons.
__global__ static void __launch_bounds__(kMaxThreads, 1) order_plan_kernel(OrderPlanLaunch launch) {
  using Left = uint16_t[kBanks][kBanks];
  const ColumnEntriesLaunch& a = launch.entries;
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int32_t from = static_cast<int32_t>(blockIdx.x) * kWindow;
  const int32_t tile = static_cast<int32_t>(blockIdx.y), first = tile * a.width;
  const SortedColumns columns = SortedColumns::in_shared(a.to);
  const bool in_order = order_columns(a, from, first, columns);
  const bool spread = a.spread && !in_order;
  const int32_t* entries = entries_of_plan(a.plan, a.d_in);
  const Turns turns = Turns::behind(columns, a.to);
  if (spread) {
    find_banks(a, columns, turns, [&](int, const SortedColumn& own, int32_t i) {
      return neuron_of(a, static_cast<uint32_t>(entries[own.begin + i]), first);
    });
    Left* const left = reinterpret_cast<Left*>(turns.turn + kWindow * a.to.light);
    for (int octet = warp; octet < kWindow / kBanks; octet += warps) {
      match_octet(columns, octet, a.to.light, turns, left[octet]);
    }
    __syncthreads();
  }
  int32_t* const order = launch.out + (order_of_plan(a.plan, a.d_in) - a.plan);
  int32_t* const ordered = launch.out + (entries - a.plan);
  if (blockIdx.x == 0 && tile == 0 && threadIdx.x == 0) {
    const OrderFacts facts = OrderFacts::of(a.to, a.width, a.spread);
    NEUROADA_UNROLL
    for (int i = 0; i < kOrderFacts; ++i) order[i] = facts.fact[i];
  }
  NEUROADA_UNROLL
  for (int n = 0; n < kWindow / kWarp; ++n) {
    const int at = threadIdx.x % kWarp + n * kWarp;
    const SortedColumn own = columns.of[at];
    if (warp == 0 && tile == 0) order[kOrderFacts + from + at] = own.column;
    const bool matched = spread && own.count() <= a.to.light;
    for (int32_t i = warp; i < own.count(); i += warps) {
      ordered[own.begin + (matched ? step_of(turns, at, i, own.count()) : i)] = entries[own.begin + i];
    }
  }
}

}  // namespace neuroada::cuda
