// The transposed product of bypass_bwd_input.cuh for bulk-copied blocks, if one tile holds all neurons and shared
// memory also has room for a tile of sums. The CTA writes a group of columns from that tile, so a lane may sum any
// column of the group. A group is one window: adjacent lanes have about the same number of connections.
#pragma once

#include "bypass_bwd_input.cuh"

namespace neuroada::cuda {

// A round of 32 columns of a warp: the lane's own column, and its first connections, loaded before they are summed.
template <bool kPacked>
struct Round {
  int32_t number;
  OrderedColumn own;
  uint32_t first;  // index of its first quad in the scratch
  FirstLoads<kPacked> held;

  // `most` is the lane's count in an earlier round of the group, an estimated upper bound of this one.
  __device__ __forceinline__ void load(const ColumnEntries& entries, int32_t wanted, int32_t most) {
    number = wanted;
    own = *entries.column(0, position());
    first = entries.first_quad<kPacked>(static_cast<uint32_t>(number), threadIdx.x % kWarp);
    held.load(from(entries), most);
  }
  __device__ __forceinline__ const Quad* from(const ColumnEntries& entries) const {
    return in_row(reinterpret_cast<const Quad*>(entries.scratch), first);
  }
  __device__ __forceinline__ uint32_t position() const {
    return static_cast<uint32_t>(number * kWarp) + threadIdx.x % kWarp;
  }
};

// Dynamic scheduling of a group's rounds: a warp starts with the round of its own number, then takes the next untaken
// one. Rounds with the most connections go first. Which warp takes a round does not change any bit of its sums.
struct SharedRounds {
  uint32_t* taken;  // rounds that all warps took, in even and odd groups
  int32_t group;    // its number, counted over all blocks

  // Called after a CTA barrier: no warp still takes rounds of the previous group, and none takes rounds of the next one
  // yet.
  __device__ __forceinline__ void clear_next() const {
    if (threadIdx.x == 0) taken[(group + 1) % 2] = 0;
  }
  __device__ __forceinline__ int32_t next() const {
    uint32_t ticket = 0;
    if (threadIdx.x % kWarp == 0) ticket = count_up(taken + group % 2);
    return static_cast<int32_t>(blockDim.x / kWarp + __shfl_sync(kAllLanes, ticket, 0));
  }
};

// Columns that are written together, as a range of rounds.
struct Group {
  int32_t begin, end;

  // The warp's first round; may be past the end.
  __device__ __forceinline__ int32_t first() const { return begin + static_cast<int32_t>(threadIdx.x / kWarp); }
};

// Sums all columns of a group over a block into the tile `out`. With kSparse it stops at the first round without
// connections: later rounds have none either, and the tile is already zero. The last round prefetches the first
// connections of the next group.
template <class T, bool kPacked, bool kSparse>
__device__ __forceinline__ void sum_group(const BypassBwdInputLaunch& a, const Quad* tile, Quad* out, Group group,
                                          Group next, const SharedRounds& shared, Round<kPacked>& round) {
  const int32_t d_in = static_cast<int32_t>(a.problem.d_in), first_column = group.begin * kWarp;
  int32_t number = group.first();
  if (number >= group.end) return;
  if (round.number != number) round.load(a.entries, number, INT32_MAX);  // the warp had no round in the previous group
  const int32_t first_of_next = next.first() < next.end ? next.first() : next.begin;
  do {
    // Only these values are needed once the next load overwrites the round: no register copy waits for its loads.
    const int32_t to = opaque(round.own.column < d_in ? place(round.own.column - first_column) : -1);
    const uint32_t position = round.position();
    const bool heavy = round.own.count > a.entries.light;
    float sum[kTokens<T>] = {};
    const int32_t count = round.own.count;
    if (!heavy) {
      round.held.load_missing(round.from(a.entries), count);
      add_light<T, true, kPacked, false>(sum, a, tile, 0, round.from(a.entries), count, round.held);
    }
    const bool last = kSparse && __ballot_sync(kAllLanes, count > 0) == 0;
    number = last ? group.end : group.begin + shared.next();
    const bool more = number < group.end;
    round.load(a.entries, more ? number : first_of_next, more ? count : INT32_MAX);
    add_heavy<T, true>(sum, a, tile, 0, 0, position, heavy);
    if (to >= 0) out[to] = rounded_quad<T>(sum);
  } while (number < group.end);
}

// A CTA processes some of the groups and some of the blocks. With kSparse, many columns have no connections.
template <class T, bool kSparse>
__global__ void __launch_bounds__(2 * kMaxThreads, 1) bypass_bwd_input_groups_kernel(BypassBwdInputLaunch a) {
  constexpr bool kPacked = kPacks<T>;
  const BypassBwdInput& p = a.problem;
  Quad* const out = shared_quads() + a.tiles.quads();
  SharedRounds shared{reinterpret_cast<uint32_t*>(out + a.out.width), 0};
  // Zeroes `taken` and, with kSparse, all sums; the barrier in start() makes them visible.
  if (threadIdx.x == 0) out[a.out.width] = Quad{};
  for (int32_t i = threadIdx.x; kSparse && i < a.out.width; i += blockDim.x) out[i] = Quad{};
  const StagedBlocks<T, true> blocks = blocks_of<T, true>(a);
  blocks.start();
  const int32_t positions = static_cast<int32_t>(a.entries.positions), width = a.out.width;
  const int32_t groups = (positions + width - 1) / width;
  const int32_t begin = groups * static_cast<int32_t>(blockIdx.x) / static_cast<int32_t>(gridDim.x),
                end = groups * static_cast<int32_t>(blockIdx.x + 1) / static_cast<int32_t>(gridDim.x);
  const auto group_of = [&](int32_t g) {
    const int32_t upto = (g + 1) * width;
    return Group{g * width / kWarp, (upto < positions ? upto : positions) / kWarp};
  };
  const auto write_group = [&](int32_t block, int32_t g) {
    const int32_t d_in = static_cast<int32_t>(p.d_in), left = d_in - g * width;
    const int64_t t = int64_t{block} * kTokens<T>;
    write_tile<T, kSparse>(out, a.out, static_cast<T*>(p.out) + t * p.out_stride + g * width, p.out_stride,
                           rows_of_block<T>(p.tokens, t), left < width ? left : width);
  };
  Round<kPacked> round{};
  round.number = -1;  // no round is loaded
  blocks.for_each_and_between(
      [&](int32_t block, const Quad* tile, int32_t, auto) {
        for (int32_t g = begin; g < end; ++g) {
          if (g > begin) {
            __syncthreads();  // the previous group is complete
            write_group(block, g - 1);
            __syncthreads();  // it is written, and the tile is free
          }
          const Group group = group_of(g), next = group_of(g + 1 < end ? g + 1 : begin);
          shared.clear_next();
          sum_group<T, kPacked, kSparse>(a, tile, out, group, next, shared, round);
          ++shared.group;
        }
      },
      [&](int32_t block) {
        if (block > blocks.begin) write_group(block - 1, end - 1);
      });
  if (blocks.begin < blocks.end) write_group(blocks.end - 1, end - 1);
}

}  // namespace neuroada::cuda
