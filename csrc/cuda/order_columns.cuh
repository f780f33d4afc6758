// Writes a plan's connections in the order of column_entries.cuh.
#pragma once

#include "column_entries.cuh"
#include "neuroada/planner.h"
#include "plan.cuh"

namespace neuroada::cuda {

struct ColumnEntriesLaunch {
  ColumnEntries to;
  const int32_t* plan;
  const float* delta;  // [entries]
  int64_t d_in, live;
  uint32_t entries, k;
  int32_t width;   // of a tile of the neurons
  int32_t absent;  // what stands for a neuron where there is no connection
  bool places;     // in their tile, instead of neurons
  bool spread;     // light columns' connections are spread over the banks

  // Of shared memory: a turn for each connection of a window.
  int64_t bytes() const { return spread ? int64_t{kWindow} * to.light * static_cast<int64_t>(sizeof(uint16_t)) : 0; }
};

// How many of the window's columns come before the lane's own two: those with more connections, and of as many
// those further left. `key` are the lane's columns, `lane` and `lane + 32` of the window.
__device__ __forceinline__ void rank_columns(const int32_t (&key)[2], int (&rank)[2]) {
  const int lane = threadIdx.x % kWarp;
  rank[0] = rank[1] = 0;
  NEUROADA_ROLLED
  for (int other = 0; other < kWarp; ++other) {
    const int32_t left = __shfl_sync(kAllLanes, key[0], other), right = __shfl_sync(kAllLanes, key[1], other);
    rank[0] += (left > key[0] || (left == key[0] && other < lane)) + (right > key[0]);
    rank[1] += (left >= key[1]) + (right > key[1] || (right == key[1] && other < lane));
  }
}

// The first of the connections [begin, end) of a column, in rising order, that is at least `least`.
__device__ __forceinline__ int32_t first_at_least(const int32_t* entry, int32_t begin, int32_t end, int64_t least) {
  while (begin < end) {
    const int32_t middle = begin + (end - begin) / 2;
    if (entry[middle] < least) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Connection i of the light column at `position`.
__device__ __forceinline__ void write_light(const ColumnEntries& to, int32_t tile, uint32_t position, uint32_t i,
                                            const WeightedNeuron& connection) {
  Quad* quads = to.quads(tile, position);
  if (to.place_mask == 0) {
    reinterpret_cast<WeightedNeuron*>(quads + i / 2 * kWarp)[i % 2] = connection;
  } else {
    const uint32_t word = pack(static_cast<uint32_t>(connection.neuron), connection.delta, to.place_mask);
    reinterpret_cast<uint32_t*>(quads + i / 4 * kWarp)[i % 4] = word;
  }
}

// The connection that the plan names; what is none, or belongs to another tile, adds nothing.
__device__ __forceinline__ WeightedNeuron connection_of(const ColumnEntriesLaunch& a, uint32_t e, int32_t first) {
  if (e >= a.entries) return {a.absent, 0.0f};
  const int32_t neuron = static_cast<int32_t>(e / a.k), offset = neuron - first;
  if (offset < 0 || offset >= a.width) return {a.absent, 0.0f};
  return {a.places ? place(offset) : neuron, a.delta[e]};
}

// Turns the banks of a column's connections into the order in which its lane reads them. The lanes of an octet read
// together, so each begins at a bank of its own and goes on to the next: where all have every bank equally often, no
// two meet. What is left when a bank has no turns left takes those that others leave.
//
// A column's are kWindow apart, so that lanes have banks of their own here too.
__device__ __forceinline__ void spread_over_banks(uint16_t* own, int32_t count, int lane) {
  constexpr uint16_t kLeft = 0xffff;
  uint64_t taken = 0;  // of the turns of each bank, 8 bits
  for (int32_t i = 0; i < count; ++i) {
    const int bank = (own[i * kWindow] - lane) & (kBanks - 1);
    const int32_t turn = bank + kBanks * static_cast<int32_t>(taken >> 8 * bank & 0xff);
    own[i * kWindow] = turn < count ? static_cast<uint16_t>(turn) : kLeft;
    taken += uint64_t{turn < count} << 8 * bank;
  }
  int32_t free = 0;
  for (int32_t i = 0; i < count; ++i) {
    if (own[i * kWindow] != kLeft) continue;
    while (free / kBanks < static_cast<int32_t>(taken >> 8 * (free % kBanks) & 0xff)) ++free;
    own[i * kWindow] = static_cast<uint16_t>(free++);
  }
}

// The columns `lane` and `lane + 32` of a window, and their connections in a tile of the neurons.
struct WindowColumns {
  int32_t begin[2], count[2];
  int rank[2];

  __device__ __forceinline__ void find(const ColumnEntriesLaunch& a, int64_t window, int32_t first) {
    const int lane = threadIdx.x % kWarp;
    const int32_t live = static_cast<int32_t>(a.live);
    const int32_t* entry = a.plan + a.d_in + 1 + kSplits + 1;
    int32_t key[2];
    NEUROADA_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int64_t column = window + h * kWarp + lane;
      begin[h] = column < a.d_in ? start_of_column(a.plan, live, column) : 0;
      int32_t end = column < a.d_in ? start_of_column(a.plan, live, column + 1) : -1;
      key[h] = end - begin[h];  // what is no column comes last; the same order in all tiles
      if (key[h] > a.to.light * a.to.tiles) key[h] = 0;
      if (a.to.tiles > 1 && end >= begin[h]) {
        end = first_at_least(entry, begin[h], end, (int64_t{first} + a.width) * a.k);
        begin[h] = first_at_least(entry, begin[h], end, int64_t{first} * a.k);
      }
      count[h] = end - begin[h];
    }
    rank_columns(key, rank);
  }
};

// A CTA has a window and a tile of the neurons, and a warp every so many-th connection of its columns.
__global__ static void column_entries_kernel(ColumnEntriesLaunch a) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t window = int64_t{blockIdx.x} * kWindow;
  const int32_t tile = static_cast<int32_t>(blockIdx.y), first = tile * a.width;
  const int32_t* entry = a.plan + a.d_in + 1 + kSplits + 1;
  WindowColumns own;
  own.find(a, window, first);
  const auto connection = [&](int h, int32_t i) {
    return connection_of(a, i < own.count[h] ? static_cast<uint32_t>(entry[own.begin[h] + i]) : a.entries, first);
  };
  NEUROADA_UNROLL
  for (int h = 0; h < 2; ++h) {
    const uint32_t position = static_cast<uint32_t>(window + own.rank[h]);
    const int64_t column = window + h * kWarp + lane;
    const int32_t count = own.count[h];
    const bool heavy = count > a.to.light;
    uint16_t* turns = reinterpret_cast<uint16_t*>(shared_quads()) + h * kWarp + lane;
    if (a.spread) {
      for (int32_t i = warp; i < count && !heavy; i += warps) {
        turns[i * kWindow] = static_cast<uint16_t>(connection(h, i).neuron & (kBanks - 1));
      }
      __syncthreads();
      if (warp == 0 && !heavy) spread_over_banks(turns, count, own.rank[h] % kBanks);
      __syncthreads();
    }
    if (warp == 0) *a.to.column(tile, position) = {static_cast<int32_t>(column < a.d_in ? column : a.d_in), count};
    if (warp == 0 && heavy) a.to.quads(tile, position)->word[0] = static_cast<uint32_t>(own.begin[h]);
    const int32_t each = connections_a_quad(a.to.place_mask);
    const int32_t padded = heavy || count < 0 ? count : (count + each - 1) / each * each;
    for (int32_t i = warp; i < padded; i += warps) {
      const WeightedNeuron one = connection(h, i);
      if (heavy) {
        *a.to.heavy(static_cast<uint32_t>(own.begin[h] + i)) = one;
      } else {
        write_light(a.to, tile, position, static_cast<uint32_t>(a.spread && i < count ? turns[i * kWindow] : i), one);
      }
    }
  }
}

}  // namespace neuroada::cuda
