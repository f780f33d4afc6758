// out[t, c] = sum over (j, s) with index[j, s] = c of delta[j, s] grad[t, j]
//
// grad [tokens, d_out], delta [d_out, k], out [tokens, d_in], all of it written. A CTA has a part of the columns
// and a part of the tokens. It stages block after block of grad as [neuron][V tokens], and each warp has columns
// of about equal work, by the plan's splits. A lane sums a light column alone; at a heavy one, which far more
// neurons than others may have chosen, the whole warp sums, and adds its lanes' sums in a fixed order.
//
// Here a lane writes what it sums; bypass_bwd_input_groups.cuh gathers it in shared memory first, and
// bypass_bwd_input_tiles.cuh where it can.
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
  int32_t part;  // positions of a CTA whose neurons come in tiles that are copied ahead
};

// Where blocks are copied ahead, connections are packed if dx's own rounding is far coarser than theirs.
template <class T>
constexpr bool kPacks = std::is_same_v<T, BFloat16>;

// Rounds of 32 columns of which a warp keeps the sums where the neurons come in tiles that are copied ahead.
constexpr int kKeptRounds = 8;

// The kernel with blocks that are copied ahead, of bypass_bwd_input_sm90.cu.
enum class BulkForm {
  groups,         // one tile that holds all neurons, and behind it one for what is summed
  sparse_groups,  // the same where many columns have no connections
  whole,          // one tile that holds all neurons, and no room behind it
  tiles           // several
};
KernelOf<BypassBwdInputLaunch> bypass_bwd_input_bulk_kernel(const BypassBwdInput&, BulkForm);

// The positions [begin, end) of columns of one of `parts` parts of equal work, at most kSplits.
struct Columns {
  int32_t begin, end;
};

// The nearest whole window.
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

// Rounds of 32 columns that the busiest warp of the CTA has.
__device__ __forceinline__ int32_t most_rounds(const BypassBwdInputLaunch& a) {
  int32_t longest = 0;
  const int64_t warps = blockDim.x / kWarp, parts = gridDim.x * warps;
  for (int64_t warp = 0; warp < warps; ++warp) {
    const Columns other = columns_of(a, blockIdx.x * warps + warp, parts);
    longest = longest < other.end - other.begin ? other.end - other.begin : longest;
  }
  return (longest + kWarp - 1) / kWarp;
}

// sum += delta (the staged neuron): an entry names its neuron's place in the staged tile, or its neuron, which may be
// in another one.
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

// The first connections of a light column, 16 bytes with a load, on their way before it is known how many there are.
template <bool kPacked>
struct FirstLoads {
  static constexpr int kLoads = 2, kEach = kPacked ? 4 : 2;  // connections_a_quad
  Quad quad[kLoads];

  // Those of a column that hardly has more than `most`: what a CTA reads anew for each block comes out of L2.
  __device__ __forceinline__ void load(const Quad* from, int32_t most) {
    NEUROADA_UNROLL
    for (int n = 0; n < kLoads; ++n) {
      quad[n] = Quad{};
      if (most > n * kEach) quad[n] = load16(from + n * kWarp);
    }
  }
  // What was left out and yet is there. A quad whose first word is zero was left out, or is loaded again for nothing.
  __device__ __forceinline__ void load_missing(const Quad* from, int32_t count) {
    NEUROADA_UNROLL
    for (int n = 0; n < kLoads; ++n) {
      if (count > n * kEach && quad[n].word[0] == 0) quad[n] = load16(from + n * kWarp);
    }
  }
};

// The connections of a light column, the next loads on their way: two of them, and before a load is read a third, if
// there are the registers for it. What is left at the end of a load are none.
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

// The connections of the columns of the lanes that say so, by the whole warp, each to its lane's sums. Which they are
// is read anew: heavy columns are few.
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

// Adds the connections of every lane's column, in the staged tile, to its sums. `lists` is which tile's they are.
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

// What the sums of a column begin with, so that it is on its way while the first connections are.
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

// Round `round` of the columns of a warp, in the staged tile; the lane's column is written with the last tile.
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

// The blocks of grad that a CTA has.
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
    // All tiles for one round of columns, whose sums a lane keeps, then for the next.
    const int32_t rounds = most_rounds(a);
    for (int32_t round = 0; round < rounds; ++round) {
      blocks.template for_each<1, 2>([&](int32_t block, const Quad* tile, int32_t first, auto) {
        run_round<T, false, false>(sum, a, own, round, block, tile, first);
      });
    }
  }
}

}  // namespace neuroada::cuda
