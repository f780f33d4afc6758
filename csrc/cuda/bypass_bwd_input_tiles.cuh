// The transposed product of bypass_bwd_input.cuh if neurons come in bulk-copied tiles. A lane keeps the sums of its
// columns over the tiles of a block, so that each is staged once; rounds of 32 columns are interleaved over the warps.
// After the last tile, the sums take its place in shared memory, from which the CTA writes them, so that a lane may
// have any column of a window that fits there.
#pragma once

#include "bypass_bwd_input.cuh"

namespace neuroada::cuda {

// The first connections of a lane's column in a tile, loaded before they are summed.
template <bool kPacked>
struct TileRound {
  int32_t count;
  const Quad* from;
  FirstLoads<kPacked> held;

  // `most` is an estimated upper bound: few columns have more connections than that of an earlier round.
  __device__ __forceinline__ void load(const ColumnEntries& entries, int32_t lists, int32_t number, int32_t most) {
    const uint32_t lane = threadIdx.x % kWarp;
    count = entries.column(lists, static_cast<uint32_t>(number * kWarp) + lane)->count;
    from = entries.quads<kPacked>(lists, static_cast<uint32_t>(number), lane);
    held.load(from, most);
  }
};

// A lane's sums of its columns. The same code sums every round; add() branches to the registers of its sums.
template <class T>
struct KeptSums {
  float of[kKeptRounds][kTokens<T>];

  __device__ __forceinline__ void clear() {
    NEUROADA_UNROLL
    for (int round = 0; round < kKeptRounds; ++round) {
      NEUROADA_UNROLL
      for (int v = 0; v < kTokens<T>; ++v) of[round][v] = 0;
    }
  }
  template <int kRound = 0>
  __device__ __forceinline__ void add(int32_t round, const float (&sum)[kTokens<T>]) {
    if (round == kRound) {
      NEUROADA_UNROLL
      for (int v = 0; v < kTokens<T>; ++v) of[kRound][v] += sum[v];
    } else if constexpr (kRound + 1 < kKeptRounds) {
      add<kRound + 1>(round, sum);
    }
  }
};

// The rounds of a CTA, assigned to its warps round-robin.
struct TileRounds {
  int32_t begin, end;

  __device__ __forceinline__ static TileRounds of(const BypassBwdInputLaunch& a) {
    const int32_t begin = static_cast<int32_t>(blockIdx.x) * (a.part / kWarp), end = begin + a.part / kWarp,
                  all = static_cast<int32_t>(a.entries.positions) / kWarp;
    return {begin, end < all ? end : all};
  }
  // The warp's first round; may be past the end.
  __device__ __forceinline__ int32_t first() const { return begin + static_cast<int32_t>(threadIdx.x / kWarp); }
  __device__ __forceinline__ static int32_t step() { return static_cast<int32_t>(blockDim.x / kWarp); }
};

// The lane's column in each of its rounds, d_in where there is none.
struct KeptColumns {
  int32_t of[kKeptRounds];

  __device__ __forceinline__ static KeptColumns load(const BypassBwdInputLaunch& a, const TileRounds& rounds) {
    KeptColumns columns;
    NEUROADA_UNROLL
    for (int r = 0; r < kKeptRounds; ++r) {
      const int32_t number = rounds.first() + r * TileRounds::step();
      columns.of[r] = static_cast<int32_t>(a.problem.d_in);
      if (number >= rounds.end) continue;
      columns.of[r] = a.entries.column(0, static_cast<uint32_t>(number * kWarp) + threadIdx.x % kWarp)->column;
    }
    return columns;
  }
};

// Writes the sums of a block, one window after another, through the memory of the tile, which all threads have read.
template <class T>
__device__ __forceinline__ void write_windows(const BypassBwdInputLaunch& a, const TileRounds& rounds,
                                              const KeptSums<T>& sums, const KeptColumns& columns, int32_t block) {
  const BypassBwdInput& p = a.problem;
  const int32_t width = a.out.width, d_in = static_cast<int32_t>(p.d_in);
  const int64_t t = int64_t{block} * kTokens<T>;
  Quad* const tile = shared_quads();
  NEUROADA_ROLLED
  for (int32_t begin = rounds.begin * kWarp; begin < rounds.end * kWarp; begin += width) {
    const int32_t left = d_in - begin, here = left < width ? left : width;
    if (begin > rounds.begin * kWarp) __syncthreads();  // the previous window is written
    NEUROADA_UNROLL
    for (int r = 0; r < kKeptRounds; ++r) {
      const uint32_t offset = static_cast<uint32_t>(columns.of[r] - begin);
      if (offset < static_cast<uint32_t>(here)) tile[place(static_cast<int>(offset))] = rounded_quad<T>(sums.of[r]);
    }
    __syncthreads();
    write_tile<T, false>(tile, a.out, static_cast<T*>(p.out) + t * p.out_stride + begin, p.out_stride,
                         rows_of_block<T>(p.tokens, t), here);
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1) bypass_bwd_input_tiles_kernel(BypassBwdInputLaunch a) {
  constexpr bool kPacked = kPacks<T>;
  const BypassBwdInput& p = a.problem;
  const StagedBlocks<T, true> blocks = blocks_of<T, true>(a);
  blocks.start();
  const TileRounds rounds = TileRounds::of(a);
  TileRound<kPacked> round{};
  if (rounds.first() < rounds.end) round.load(a.entries, 0, rounds.first(), INT32_MAX);
  KeptSums<T> sums;
  sums.clear();
  blocks.template for_each<1, 1>([&](int32_t block, const Quad* tile, int32_t first, auto) {
    const int32_t lists = first / a.tiles.width;
    const bool last = first + a.tiles.width >= a.tiles.columns;
    if (first == 0) sums.clear();
    NEUROADA_ROLLED
    for (int32_t r = 0, number = rounds.first(); number < rounds.end; ++r) {
      const uint32_t position = static_cast<uint32_t>(number * kWarp) + threadIdx.x % kWarp;
      const bool heavy = round.count > a.entries.light;
      float sum[kTokens<T>] = {};
      if (p.base != nullptr && first == 0) {
        set_to_base<T>(sum, p, int64_t{block} * kTokens<T>, a.entries.column(0, position)->column);
      }
      const int32_t count = round.count;
      if (!heavy) {
        round.held.load_missing(round.from, count);
        add_light<T, true, kPacked, false>(sum, a, tile, 0, round.from, count, round.held);
      }
      number += TileRounds::step();
      const bool more = number < rounds.end;
      const int32_t next = more ? number : rounds.first();
      // After the first tile, counts rise as often as they fall, by little.
      const int32_t most = !more ? INT32_MAX : count > 0 ? count : 1;
      round.load(a.entries, more ? lists : last ? 0 : lists + 1, next, most);
      add_heavy<T, true>(sum, a, tile, 0, lists, position, heavy);
      sums.add(r, sum);
    }
    if (!last) return;
    const KeptColumns columns = KeptColumns::load(a, rounds);
    if (a.out.width > 0) {
      __syncthreads();  // all threads have read the tile
      write_windows<T>(a, rounds, sums, columns, block);
    } else {
      NEUROADA_UNROLL
      for (int r = 0; r < kKeptRounds; ++r) {
        if (columns.of[r] >= p.d_in) continue;
        write_column<T>(sums.of[r], p, int64_t{block} * kTokens<T>, static_cast<uint32_t>(columns.of[r]));
      }
    }
  });
}

}  // namespace neuroada::cuda
