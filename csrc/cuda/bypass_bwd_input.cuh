// out[t, c] = sum over (j, s) with index[j, s] = c of delta[j, s] grad[t, j]
//
// grad [tokens, d_out], delta [d_out, k], out [tokens, d_in]; all of out is written. A CTA processes a part of the
// columns and a part of the tokens. It stages grad block by block as [neuron][V tokens]; the plan's splits give each
// warp columns of about equal work. One lane sums a light column. A heavy column, which many more neurons chose, is
// summed by the whole warp, whose lanes' sums are added in a fixed order.
//
// In this kernel, lanes write their sums directly; bypass_bwd_input_groups.cuh stages them in shared memory first, and
// so does bypass_bwd_input_tiles.cuh where possible.
#pragma once

#include "bulk_staging.cuh"
#include "column_entries.cuh"
#include "kernels.h"
#include "neuroada/planner.h"
#include "out_tile.cuh"
#include "plan.cuh"

namespace neuroada::cuda {

struct BypassBwdInputLaunch {
  BypassBwdInput problem;
  Tiles tiles;     // of the neurons
  int64_t blocks;  // of tokens
  ColumnEntries entries;
  OutTile out;
  int32_t part;  // column positions per CTA if neurons come in bulk-copied tiles
};

// Whether kernels with bulk-copied blocks pack connections: only if dx's own rounding is far coarser than theirs.
template <class T>
constexpr bool kPacks = std::is_same_v<T, BFloat16>;

// Rounds of 32 columns whose sums a warp keeps in registers if neurons come in bulk-copied tiles.
constexpr int kKeptRounds = 8;

// The kernels with bulk-copied blocks, see bypass_bwd_input_sm90.cu.
enum class BulkForm {
  groups,         // one tile holds all neurons, followed by a tile of sums
  sparse_groups,  // the same if many columns have no connections
  whole,          // one tile holds all neurons, without room for sums
  tiles           // several tiles of neurons
};
KernelOf<BypassBwdInputLaunch> bypass_bwd_input_bulk_kernel(const BypassBwdInput&, BulkForm);

// Column positions [begin, end) of one of `parts` parts of equal work, at most kSplits.
struct Columns {
  int32_t begin, end;
};

// The plan's split, rounded to the nearest window and clamped.
__device__ __forceinline__ int32_t split_of(const BypassBwdInputLaunch& a, int64_t part, int64_t parts) {
  const int64_t d_in = a.problem.d_in, column = a.problem.plan[d_in + 1 + kSplits * part / parts];
  const int64_t bounded = column < 0      ? 0
                          : column < d_in ? (column + kWindow / 2) / kWindow * kWindow
                                          : a.entries.positions;
  return static_cast<int32_t>(bounded < a.entries.positions ? bounded : a.entries.positions);
}

__device__ __forceinline__ Columns columns_of(const BypassBwdInputLaunch& a, int64_t part, int64_t parts) {
  return {split_of(a, part, parts), split_of(a, part + 1, parts)};
}

// Number of rounds of 32 columns of the CTA's busiest warp.
__device__ __forceinline__ int32_t most_rounds(const BypassBwdInputLaunch& a) {
  int32_t longest = 0;
  const int64_t warps = blockDim.x / kWarp, parts = gridDim.x * warps;
  for (int64_t warp = 0; warp < warps; ++warp) {
    const Columns other = columns_of(a, blockIdx.x * warps + warp, parts);
    longest = longest < other.end - other.begin ? other.end - other.begin : longest;
  }
  return (longest + kWarp - 1) / kWarp;
}

// sum += delta (the staged neuron). With kPlaces, `neuron` is its place in the staged tile; otherwise its index,
// possibly in another tile.
template <class T, bool kPlaces>
__device__ __forceinline__ void add_entry(float (&sum)[kTokens<T>], const Tiles& tiles, const Quad* tile, int32_t first,
                                          int32_t neuron, float delta) {
  if constexpr (kPlaces) {
    add_column<T>(sum, delta, tile[neuron]);
  } else {
    bool inside;
    const int at = place_in_tile(tiles, neuron, first, inside);
    add_column<T>(sum, inside ? delta : 0.0f, tile[at]);
  }
}

// The first connections of a light column, 16 bytes per load, loaded before their number is known.
template <bool kPacked>
struct FirstLoads {
  static constexpr int kLoads = 2, kEach = kPacked ? 4 : 2;  // connections_per_quad
  Quad quad[kLoads];

  // Loads up to `most` connections, an estimate that limits the L2 traffic: each block loads them again.
  __device__ __forceinline__ void load(const Quad* from, int32_t most) {
    NEUROADA_UNROLL
    for (int n = 0; n < kLoads; ++n) {
      quad[n] = Quad{};
      if (most > n * kEach) quad[n] = load16(from + n * kWarp);
    }
  }
  // Loads the quads within `count` that load() skipped: those with a first word of zero. Reloading others is harmless.
  __device__ __forceinline__ void load_missing(const Quad* from, int32_t count) {
    NEUROADA_UNROLL
    for (int n = 0; n < kLoads; ++n) {
      if (count > n * kEach && quad[n].word[0] == 0) quad[n] = load16(from + n * kWarp);
    }
  }
};

// Adds a light column's connections with two loads in flight, or three with kThird, which takes more registers. Unused
// connections in the last quad are absent ones, which add zero.
template <class T, bool kPlaces, bool kPacked, bool kThird>
__device__ __forceinline__ void add_light(float (&sum)[kTokens<T>], const BypassBwdInputLaunch& a, const Quad* tile,
                                          int32_t first, const Quad* from, int32_t count, FirstLoads<kPacked>& held) {
  constexpr int kLoads = FirstLoads<kPacked>::kLoads, kEach = FirstLoads<kPacked>::kEach;
  for (int32_t left = count; left > 0; left -= kEach * kLoads) {
    from += kLoads * kWarp;
    NEUROADA_UNROLL
    for (int n = 0; n < kLoads; ++n) {
      if (n > 0 && left <= n * kEach) break;
      const Quad now = held.quad[n];
      const bool more = left > (n + kLoads) * kEach;
      if (kThird && more) held.quad[n] = load16(from + n * kWarp);
      NEUROADA_UNROLL
      for (int q = 0; q < kEach; ++q) {
        if (q == 2 && left <= n * kEach + 2) break;
        const WeightedNeuron one = connection<kPacked>(now, q, a.entries.place_mask);
        add_entry<T, kPlaces>(sum, a.tiles, tile, first, one.neuron, one.delta);
      }
      if (!kThird && more) held.quad[n] = load16(from + n * kWarp);
    }
  }
}

// Sums each of N values over all lanes; every lane gets all sums. Lanes exchange halves of the values first, which
// takes about 2 N shuffles instead of 5 N; the additions form a fixed tree.
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

// The whole warp sums the column of each lane with `heavy` set, into that lane's `sum`. The position of its connections
// is read again here: heavy columns are few.
template <class T, bool kPlaces>
__device__ __forceinline__ void add_heavy(float (&sum)[kTokens<T>], const BypassBwdInputLaunch& a, const Quad* tile,
                                          int32_t first, int32_t lists, uint32_t position, bool heavy) {
  constexpr int V = kTokens<T>;
  const int lane = threadIdx.x % kWarp;
  unsigned left = __ballot_sync(kAllLanes, heavy);
  if (left == 0) return;
  const int32_t own_count = heavy ? a.entries.column(lists, position)->count : 0;
  const uint32_t own_begin = heavy ? a.entries.quads(lists, position)->word[0] : 0;
  for (; left != 0; left &= left - 1) {
    const int owner = __ffs(static_cast<int>(left)) - 1;
    const int32_t count = __shfl_sync(kAllLanes, own_count, owner);
    const WeightedNeuron* entries = a.entries.heavy(__shfl_sync(kAllLanes, own_begin, owner));
    float shared[V] = {};
    NEUROADA_ROLLED
    for (int32_t i = lane; i < count; i += kWarp) {
      add_entry<T, kPlaces>(shared, a.tiles, tile, first, entries[i].neuron, entries[i].delta);
    }
    sum_over_warp(shared, lane);
    NEUROADA_UNROLL
    for (int v = 0; v < V; ++v) sum[v] += lane == owner ? shared[v] : 0.0f;
  }
}

// Adds the connections of each lane's column in the staged tile to its sums; `lists` selects the tile in a.entries.
template <class T, bool kPlaces, bool kPacked>
__device__ __forceinline__ void add_columns(float (&sum)[kTokens<T>], const BypassBwdInputLaunch& a, const Quad* tile,
                                            int32_t first, int32_t lists, uint32_t position, OrderedColumn own) {
  const bool heavy = own.count > a.entries.light;
  if (!heavy) {
    const Quad* from = a.entries.quads<kPacked>(lists, position / kWarp, position % kWarp);
    FirstLoads<kPacked> held;
    held.load(from, own.count);
    add_light<T, kPlaces, kPacked, true>(sum, a, tile, first, from, own.count, held);
  }
  add_heavy<T, kPlaces>(sum, a, tile, first, lists, position, heavy);
}

// Initialises a column's sums with base or zero. The loads overlap with those of the first connections.
template <class T>
__device__ __forceinline__ void set_to_base(float (&sum)[kTokens<T>], const BypassBwdInput& p, int64_t t, int32_t c) {
  const int rows = rows_of_block<T>(p.tokens, t);
  NEUROADA_UNROLL
  for (int v = 0; v < kTokens<T>; ++v) sum[v] = 0;
  if (p.base == nullptr || c >= p.d_in) return;
  NEUROADA_UNROLL
  for (int v = 0; v < kTokens<T>; ++v) {
    if (v < rows) sum[v] = *in_row(p.base + (t + v) * p.base_stride, static_cast<uint32_t>(c));
  }
}

template <class T>
__device__ __forceinline__ void write_column(const float (&sum)[kTokens<T>], const BypassBwdInput& p, int64_t t,
                                             uint32_t c) {
  T* out = static_cast<T*>(p.out) + t * p.out_stride;
  const int rows = rows_of_block<T>(p.tokens, t);
  if (rows == kTokens<T>) {  // nearly always
    NEUROADA_UNROLL
    for (int v = 0; v < kTokens<T>; ++v) *in_row(out + v * p.out_stride, c) = round_to<T>(sum[v]);
    return;
  }
  NEUROADA_UNROLL
  for (int v = 0; v < kTokens<T>; ++v) {
    if (v < rows) *in_row(out + v * p.out_stride, c) = round_to<T>(sum[v]);
  }
}

// Processes round `round` of a warp's columns in the staged tile; after the last tile, writes the lane's column.
template <class T, bool kPlaces, bool kPacked>
__device__ __forceinline__ void run_round(float (&sum)[kTokens<T>], const BypassBwdInputLaunch& a, Columns part,
                                          int32_t round, int32_t block, const Quad* tile, int32_t first) {
  const BypassBwdInput& p = a.problem;
  const int32_t position = part.begin + round * kWarp + static_cast<int32_t>(threadIdx.x % kWarp);
  const int32_t lists = a.entries.tiles == 1 ? 0 : first / a.tiles.width;
  OrderedColumn own{static_cast<int32_t>(p.d_in), 0};
  if (position < part.end) own = *a.entries.column(lists, position);
  if (first == 0) set_to_base<T>(sum, p, int64_t{block} * kTokens<T>, own.column);
  add_columns<T, kPlaces, kPacked>(sum, a, tile, first, lists, position, own);
  if (own.column < p.d_in && first + a.tiles.width >= a.tiles.columns) {
    write_column<T>(sum, p, int64_t{block} * kTokens<T>, static_cast<uint32_t>(own.column));
  }
}

// The blocks of grad that this CTA processes.
template <class T, bool kBulk>
__device__ __forceinline__ StagedBlocks<T, kBulk> blocks_of(const BypassBwdInputLaunch& a) {
  const BypassBwdInput& p = a.problem;
  return {a.tiles,
          static_cast<const T*>(p.grad),
          p.grad_stride,
          p.tokens,
          static_cast<int32_t>(a.blocks * blockIdx.y / gridDim.y),
          static_cast<int32_t>(a.blocks * (blockIdx.y + 1) / gridDim.y)};
}

template <class T, bool kWhole, bool kBulk>
__global__ void __launch_bounds__(kBulk ? 2 * kMaxThreads : kMaxThreads, 1)
    bypass_bwd_input_kernel(BypassBwdInputLaunch a) {
  const StagedBlocks<T, kBulk> blocks = blocks_of<T, kBulk>(a);
  blocks.start();
  const int64_t warps = blockDim.x / kWarp;
  const Columns own = columns_of(a, blockIdx.x * warps + threadIdx.x / kWarp, gridDim.x * warps);
  float sum[kTokens<T>];
  if constexpr (kWhole) {
    const int32_t rounds = (own.end - own.begin + kWarp - 1) / kWarp;
    blocks.template for_each<2, 1>([&](int32_t block, const Quad* tile, int32_t first, auto part) {
      const int32_t half = rounds - rounds / 2;
      const int32_t from = decltype(part)::value == 0 ? 0 : half, to = decltype(part)::value == 0 ? half : rounds;
      for (int32_t round = from; round < to; ++round) {
        run_round<T, true, kBulk && kPacks<T>>(sum, a, own, round, block, tile, first);
      }
    });
  } else {
    // One pass over all tiles per round of columns: a lane keeps the sums of one round.
    const int32_t rounds = most_rounds(a);
    for (int32_t round = 0; round < rounds; ++round) {
      blocks.template for_each<1, 2>([&](int32_t block, const Quad* tile, int32_t first, auto) {
        run_round<T, false, false>(sum, a, own, round, block, tile, first);
      });
    }
  }
}

}  // namespace neuroada::cuda
