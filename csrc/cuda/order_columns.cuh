// Writes a plan's connections in the layout of column_entries.cuh: in the order that the plan holds (order_plan.cuh),
// or in one that is computed here.
#pragma once

#include "order_facts.cuh"
#include "sort_columns.cuh"

namespace neuroada::cuda {

struct ColumnEntriesLaunch {
  ColumnEntries to;
  const int32_t* plan;
  const float* delta;  // [entries]
  int64_t d_in, live;
  uint32_t entries, k;
  int32_t width;   // of a tile of the neurons
  int32_t absent;  // the neuron of an absent connection
  bool places;     // writes places in the tile instead of neurons
  bool spread;     // light columns' connections are spread over the banks

  // Shared memory, with a bank and a turn for each connection of a CTA's columns if they are spread.
  int64_t bytes(int64_t threads) const {
    return SortedColumns::bytes(threads, to) +
           (spread ? int64_t{kWindow} * to.light * 2 * int64_t{sizeof(uint16_t)} : 0);
  }
};

// The first of the ascending connections [begin, end) of a column that is at least `least`.
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

// Writes connection i of the light column at `position`.
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

// The neuron or place of entry e of the plan; absent if e is out of range or in another tile.
__device__ __forceinline__ int32_t neuron_of(const ColumnEntriesLaunch& a, uint32_t e, int32_t first) {
  if (e >= a.entries) return a.absent;
  const int32_t neuron = static_cast<int32_t>(e / a.k), offset = neuron - first;
  if (offset < 0 || offset >= a.width) return a.absent;
  return a.places ? place(offset) : neuron;
}

// The same with its delta, zero if absent.
__device__ __forceinline__ WeightedNeuron connection_of(const ColumnEntriesLaunch& a, uint32_t e, int32_t first) {
  const int32_t neuron = neuron_of(a, e, first);
  return {neuron, neuron == a.absent ? 0.0f : a.delta[e]};
}

__device__ __forceinline__ bool any_lane(bool own) { return __ballot_sync(kAllLanes, own) != 0; }

// Bit mask of the connections of a column, of the 32 from `from` on, that are in the `wanted` bank of the lane. The
// eight lanes of an octet have one column, and each looks up four connections.
__device__ __forceinline__ unsigned of_bank(const uint16_t* bank, int32_t from, int32_t count, int wanted, int octet) {
  static_assert(kBanks == 8, "three bits");
  constexpr int kEach = kWarp / kBanks;
  unsigned own[kEach], of_wanted = 0;
  NEUROADA_UNROLL
  for (int n = 0; n < kEach; ++n) {
    const int32_t i = from + n * kBanks + static_cast<int32_t>(threadIdx.x % kBanks);
    own[n] = i < count ? bank[i * kWindow] : 0;
  }
  NEUROADA_UNROLL
  for (int n = 0; n < kEach; ++n) {
    unsigned others = 0;
    NEUROADA_UNROLL
    for (int bit = 0; bit < 3; ++bit) {
      others |= __ballot_sync(kAllLanes, own[n] >> bit & 1) ^ (wanted >> bit & 1 ? kAllLanes : 0);
    }
    of_wanted |= (~others >> octet & 0xff) << n * kBanks;
  }
  const int32_t left = count - from;
  return left >= kWarp ? of_wanted : left <= 0 ? 0 : of_wanted & ((1u << left) - 1);
}

// Assigns turns to a column's connections by their banks: the order in which its lane reads them. The lanes of an octet
// read together, so each begins at a different bank, its column's `first`, and goes on to the next: if every bank has
// equally many connections, there are no bank conflicts. Connections beyond their bank's turns take turns that other
// banks leave free.
//
// Eight lanes process a column, each the connections of one bank: their turns are every eighth.
__device__ __forceinline__ void spread_over_banks(const uint16_t* bank, uint16_t* turn, int32_t count, int32_t first) {
  const int own = threadIdx.x % kBanks, octet = static_cast<int>(threadIdx.x % kWarp) - own;
  const auto turns_of = [&](int b) { return (count + kBanks - 1 - b) / kBanks; };
  const unsigned of_first = of_bank(bank, 0, count, own + first, octet);
  int32_t have = __popc(of_first);
  for (int32_t from = kWarp; any_lane(from < count); from += kWarp) {
    have += __popc(of_bank(bank, from, count, own + first, octet));
  }
  const int32_t taken = have < turns_of(own) ? have : turns_of(own);
  uint64_t taken_of = 0;  // turns taken per bank, 8 bits each: the launcher's limit of bytes() bounds them
  int32_t skipped = 0;    // free turns that the lanes before this one take
  for (int b = 0; b < kBanks; ++b) {
    taken_of |= uint64_t(__shfl_sync(kAllLanes, static_cast<uint32_t>(taken), octet + b)) << 8 * b;
    const int32_t left = __shfl_sync(kAllLanes, have - taken, octet + b);
    skipped += b < own ? left : 0;
  }
  int32_t nth = 0;
  int other = 0;
  for (int32_t from = 0; any_lane(from < count); from += kWarp) {
    unsigned left = from == 0 ? of_first : of_bank(bank, from, count, own + first, octet);
    for (; left != 0; left &= left - 1, ++nth) {
      int32_t place_in_order = own + kBanks * nth;
      if (nth >= taken) {
        const auto taken_by = [&](int b) { return static_cast<int32_t>(taken_of >> 8 * b & 0xff); };
        for (; skipped >= turns_of(other) - taken_by(other); ++other) skipped -= turns_of(other) - taken_by(other);
        place_in_order = other + kBanks * (taken_by(other) + skipped++);
      }
      const int32_t i = from + __ffs(static_cast<int>(left)) - 1;
      turn[i * kWindow] = static_cast<uint16_t>(place_in_order);
    }
  }
}

// Assigns turns to all columns of the CTA; those of a column are kWindow apart in `bank` and `turn`.
__device__ __forceinline__ void spread_columns(const SortedColumns& columns, uint32_t position, int32_t light,
                                               const uint16_t* bank, uint16_t* turn) {
  const int32_t octets = blockDim.x / kBanks;
  for (int32_t from = 0; from < kWindow; from += octets) {
    const int32_t at = from + static_cast<int32_t>(threadIdx.x / kBanks);
    const int32_t own = at < kWindow ? at : 0, count = columns.of[own].count();
    const bool spread = at < kWindow && count > 0 && count <= light;
    spread_over_banks(bank + own, turn + own, spread ? count : 0, static_cast<int32_t>(position + own) % kBanks);
  }
}

// Restricts each column to its connections in a tile of the neurons.
__device__ __forceinline__ void keep_tile(const ColumnEntriesLaunch& a, const SortedColumns& columns, int32_t first) {
  const int32_t* entry = ColumnStarts{a.plan, a.d_in, 0}.entries();
  for (int32_t at = threadIdx.x; at < kWindow; at += blockDim.x) {
    SortedColumn& own = columns.of[at];
    if (own.end < own.begin) continue;
    own.end = first_at_least(entry, own.begin, own.end, (int64_t{first} + a.width) * a.k);
    own.begin = first_at_least(entry, own.begin, own.end, int64_t{first} * a.k);
  }
  __syncthreads();
}

// Finds the CTA's columns in order, restricted to its tile of the neurons. Returns whether the plan holds the order.
__device__ __forceinline__ bool order_columns(const ColumnEntriesLaunch& a, int32_t from, int32_t first,
                                              const SortedColumns& columns) {
  const ColumnStarts starts{a.plan, a.d_in, static_cast<int32_t>(a.live)};
  const int32_t* order = order_of_plan(a.plan, a.d_in);
  const bool ordered = OrderFacts::of(a.to, a.width, a.spread).match(order);
  if (ordered) {
    for (int32_t at = threadIdx.x; at < kWindow; at += blockDim.x) {
      columns.of[at] = starts.column(ordered_column(order, a.to, a.d_in, from + at));
    }
    __syncthreads();
  } else {
    sort_columns(starts, a.to, int64_t{a.width} * a.k, from, columns);
  }
  if (a.to.tiles > 1) keep_tile(a, columns, first);
  return ordered;
}

// Scratch for spreading: a bank for each connection, then a turn for each; those of a column are kWindow apart.
struct Turns {
  uint16_t *bank, *turn;

  __device__ __forceinline__ static Turns behind(const SortedColumns& columns, const ColumnEntries& to) {
    uint16_t* const bank = columns.kind + to.window;
    return {bank, bank + kWindow * to.light};
  }
};

// Finds the bank of each connection of the CTA's light columns: neuron(n, column, i) is the place of connection i.
template <class F>
__device__ __forceinline__ void find_banks(const ColumnEntriesLaunch& a, const SortedColumns& columns,
                                           const Turns& turns, F&& neuron) {
  const int warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  NEUROADA_UNROLL
  for (int n = 0; n < kWindow / kWarp; ++n) {
    const int at = threadIdx.x % kWarp + n * kWarp;
    const SortedColumn own = columns.of[at];
    for (int32_t i = warp; i < own.count() && own.count() <= a.to.light; i += warps) {
      turns.bank[i * kWindow + at] = static_cast<uint16_t>(neuron(n, own, i) & (kBanks - 1));
    }
  }
  __syncthreads();
}

// A CTA processes kWindow positions and one tile of the neurons; its columns' connections are interleaved over its
// warps. The first connection of each lane is loaded before all are spread.
__global__ static void __launch_bounds__(kMaxThreads, 2) column_entries_kernel(ColumnEntriesLaunch a) {
  constexpr int kEach = kWindow / kWarp;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int32_t from = static_cast<int32_t>(blockIdx.x) * kWindow;
  const int32_t tile = static_cast<int32_t>(blockIdx.y), first = tile * a.width;
  const SortedColumns columns = SortedColumns::in_shared(a.to);
  const bool in_order = order_columns(a, from, first, columns);
  const bool spread = a.spread && !in_order;
  const int32_t* entries = entries_of_plan(a.plan, a.d_in);
  const auto connection = [&](const SortedColumn& of, int32_t i) {
    const uint32_t e = i < of.count() ? static_cast<uint32_t>(entries[of.begin + i]) : a.entries;
    return connection_of(a, e, first);
  };
  WeightedNeuron held[kEach];
  NEUROADA_UNROLL
  for (int n = 0; n < kEach; ++n) held[n] = connection(columns.of[lane + n * kWarp], warp);
  const Turns turns = Turns::behind(columns, a.to);
  if (spread) {
    find_banks(a, columns, turns, [&](int n, const SortedColumn& own, int32_t i) {
      return i == warp ? held[n].neuron : connection(own, i).neuron;
    });
    spread_columns(columns, static_cast<uint32_t>(from), a.to.light, turns.bank, turns.turn);
    __syncthreads();
  }
  NEUROADA_UNROLL
  for (int n = 0; n < kEach; ++n) {
    const int at = lane + n * kWarp;
    const uint32_t position = static_cast<uint32_t>(from + at);
    const SortedColumn own = columns.of[at];
    const int32_t count = own.count();
    const bool heavy = count > a.to.light;
    if (warp == 0) *a.to.column(tile, position) = {own.column, count};
    if (warp == 0 && heavy) a.to.quads(tile, position)->word[0] = static_cast<uint32_t>(own.begin);
    const int32_t each = connections_per_quad(a.to.place_mask);
    const int32_t padded = heavy || count < 0 ? count : (count + each - 1) / each * each;
    for (int32_t i = warp; i < padded; i += warps) {
      const WeightedNeuron one = i == warp ? held[n] : connection(own, i);
      if (heavy) {
        *a.to.heavy(static_cast<uint32_t>(own.begin + i)) = one;
      } else {
        const bool turned = spread && i < count;
        write_light(a.to, tile, position, static_cast<uint32_t>(turned ? turns.turn[i * kWindow + at] : i), one);
      }
    }
  }
}

}  // namespace neuroada::cuda
