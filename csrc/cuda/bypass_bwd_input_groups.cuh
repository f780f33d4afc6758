// The transposed product of bypass_bwd_input.cuh where blocks are copied ahead, a tile has all neurons, and shared
// memory has room behind it for what is summed: a group of columns waits there for the CTA to write it. So a lane may
// have any column of the group, and the group is one window: lanes have about as many connections as their neighbours.
#pragma once

#include "bypass_bwd_input.cuh"

namespace neuroada::cuda {

// The columns of a warp, 32 side by side, a lane's own, and its first connections, on their way before they are summed.
template <bool kPacked>
struct Round {
  int32_t number;
  OrderedColumn own;
  uint32_t first;  // of the quads in the scratch
  FirstLoads<kPacked> held;

  // Of columns that have no more than `most` connections each, as those of a round before in the group have.
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

// The rounds of a group, which warps share: a warp begins with the one of its own number, and then takes the next that
// none has. Those with the most connections go first. Which warp has a round changes no bit of its sums.
struct SharedRounds {
  uint32_t* taken;  // by all warps, in groups of even number and in others
  int32_t group;    // its number, over all blocks

  // Behind a barrier that all have come to: nobody takes a round of the group before any more, and nobody one of the
  // next yet.
  __device__ __forceinline__ void clear_next() const {
    if (threadIdx.x == 0) taken[(group + 1) % 2] = 0;
  }
  __device__ __forceinline__ int32_t next() const {
    uint32_t ticket = 0;
    if (threadIdx.x % kWarp == 0) ticket = count_up(taken + group % 2);
    return static_cast<int32_t>(blockDim.x / kWarp + __shfl_sync(kAllLanes, ticket, 0));
  }
};

// Columns that are written together, by their rounds.
struct Group {
  int32_t begin, end;

  // Of the warp; it may have none.
  __device__ __forceinline__ int32_t first() const { return begin + static_cast<int32_t>(threadIdx.x / kWarp); }
};

// Sums all columns of a group over a block, and leaves them in the tile for what is written; but for rounds without any
// connection, behind which there are no others, if kSparse: the tile is zero. Before the last are summed, the first of
// the next group are on their way.
template <class T, bool kPacked, bool kSparse>
__device__ __forceinline__ void sum_group(const BypassBwdInputLaunch& a, const Quad* tile, Quad* out, Group group,
                                          Group next, const SharedRounds& shared, Round<kPacked>& round) {
  const int32_t d_in = static_cast<int32_t>(a.problem.d_in), first_column = group.begin * kWarp;
  int32_t number = group.first();
  if (number >= group.end) return;
  if (round.number != number) round.load(a.entries, number, INT32_MAX);  // the warp had none in the group before
  const int32_t first_of_next = next.first() < next.end ? next.first() : next.begin;
  do {
    // Nothing of the round but this is needed once its loads are those of the next: no copy waits for them.
    const int32_t to = made_anew(round.own.column < d_in ? place(round.own.column - first_column) : -1);
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

// A CTA has some of the groups and some of the blocks. If kSparse, many columns have no connections.
template <class T, bool kSparse>
__global__ void __launch_bounds__(2 * kMaxThreads, 1) bypass_bwd_input_groups_kernel(BypassBwdInputLaunch a) {
  constexpr bool kPacked = kPacks<T>;
  const BypassBwdInput& p = a.problem;
  Quad* const out = shared_quads() + a.tiles.quads();
  SharedRounds shared{reinterpret_cast<uint32_t*>(out + a.out.width), 0};
  // start() shows them to all: `taken`, and where that is wanted all sums.
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
  round.number = -1;  // none is on its way
  blocks.for_each_and_between(
      [&](int32_t block, const Quad* tile, int32_t, auto) {
        for (int32_t g = begin; g < end; ++g) {
          if (g > begin) {
            __syncthreads();  // the group before is whole
            write_group(block, g - 1);
            __syncthreads();  // it is written, and its place is free
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
