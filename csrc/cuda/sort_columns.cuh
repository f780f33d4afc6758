// Sorts the columns of a window by how many connections they have: a counting sort in shared memory. Every CTA of a
// window does it anew, and keeps the kWindow positions that are its own: that is little work next to writing their
// connections, which so many CTAs share.
#pragma once

#include "column_entries.cuh"
#include "plan.cuh"

namespace neuroada::cuda {

// The connections [begin, end) of a column, d_in where there is none.
struct SortedColumn {
  int32_t column, begin, end;

  __device__ __forceinline__ int32_t count() const { return end - begin; }
};

// Kinds of columns, of which one with more connections comes first; then what is no column, and heavy ones.
constexpr int kKinds = 128, kNoColumn = kKinds - 2, kHeavy = kKinds - 1;

struct SortedColumns {
  SortedColumn* of;  // [kWindow]
  int32_t* before;   // [kKinds] columns of a kind before it
  int32_t* seen;     // [warps, kKinds] columns of each kind that warps before have, and then those of its own so far

  // Whole quads.
  __host__ __device__ static int64_t bytes(int64_t threads) {
    return kWindow * int64_t{sizeof(SortedColumn)} + (1 + threads / kWarp) * kKinds * int64_t{sizeof(int32_t)};
  }
  __device__ __forceinline__ static SortedColumns in_shared() {
    SortedColumn* const of = reinterpret_cast<SortedColumn*>(shared_quads());
    int32_t* const before = reinterpret_cast<int32_t*>(of + kWindow);
    return {of, before, before + kKinds};
  }
  __device__ __forceinline__ uint16_t* behind() const {
    return reinterpret_cast<uint16_t*>(seen + blockDim.x / kWarp * kKinds);
  }
};

struct ColumnStarts {
  const int32_t* plan;
  int64_t d_in;
  int32_t live;

  __device__ __forceinline__ SortedColumn column(int32_t column) const {
    if (column >= d_in) return {static_cast<int32_t>(d_in), 0, -1};
    return {column, start_of_column(plan, live, column), start_of_column(plan, live, column + 1)};
  }
};

// The kind of a column, in all tiles the same. As fine as there are kinds: of up to 2^coarse different counts.
struct Kinds {
  int64_t d_in;
  int32_t most;  // connections of a column that is not heavy
  int coarse;

  __device__ __forceinline__ static Kinds of(const ColumnStarts& starts, const ColumnEntries& to) {
    const int32_t most = to.light * to.tiles;
    int coarse = 0;
    while (most >> coarse >= kNoColumn) ++coarse;
    return {starts.d_in, most, coarse};
  }
  __device__ __forceinline__ int of(const SortedColumn& column) const {
    if (column.column >= d_in) return kNoColumn;
    const int32_t count = column.count() > 0 ? column.count() : 0;
    return count > most ? kHeavy : (most - count) >> coarse;
  }
};

// f(column) of each lane's columns from `begin` on, 32 of a warp after another; the starts of several are on their way
// at once.
template <class F>
__device__ __forceinline__ void for_each_column(const ColumnStarts& starts, int32_t begin, int32_t end, F&& f) {
  constexpr int kAtOnce = 4;
  const int32_t lane = threadIdx.x % kWarp;
  for (int32_t c = begin; c < end; c += kAtOnce * kWarp) {
    SortedColumn column[kAtOnce];
    NEUROADA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (c + i * kWarp < end) column[i] = starts.column(c + i * kWarp + lane);
    }
    NEUROADA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (c + i * kWarp < end) f(column[i]);
    }
  }
}

// before[kind] = how many columns come before those of a kind; by the first warp.
__device__ __forceinline__ void sum_kinds(int32_t* before) {
  constexpr int kEach = kKinds / kWarp;
  const int lane = threadIdx.x % kWarp;
  int32_t* const own = before + lane * kEach;
  int32_t count[kEach], sum = 0;
  NEUROADA_UNROLL
  for (int i = 0; i < kEach; ++i) sum += count[i] = own[i];
  int32_t upto = sum;
  NEUROADA_UNROLL
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int32_t other = __shfl_sync(kAllLanes, upto, lane >= offset ? lane - offset : lane);
    upto += lane >= offset ? other : 0;
  }
  upto -= sum;
  NEUROADA_UNROLL
  for (int i = 0; i < kEach; ++i) {
    own[i] = upto;
    upto += count[i];
  }
}

// The position in a window of `columns` columns, `heavy` of them heavy, of the rank-th in the order. Heavy columns take
// the last lanes of all 32s in turn, the others what is left.
__device__ __forceinline__ int32_t position_of(int32_t rank, int32_t columns, int32_t heavy) {
  if (heavy == 0) return rank;
  const int32_t rounds = columns / kWarp, light = columns - heavy;
  if (rank >= light) return (rank - light) % rounds * kWarp + (kWarp - 1 - (rank - light) / rounds);
  // The first 32s have one heavy column more.
  const int32_t more = heavy % rounds, least = kWarp - 1 - heavy / rounds, left = rank - more * least;
  if (left < 0) return rank / least * kWarp + rank % least;
  return (more + left / (least + 1)) * kWarp + left % (least + 1);
}

// The columns at the positions from `from` on, in all of the CTA's threads. A warp has neighbouring columns, and of as
// many connections those further left come first: the order is the same every time.
__device__ __forceinline__ void sort_columns(const ColumnStarts& starts, const ColumnEntries& to, int32_t from,
                                             const SortedColumns& sorted) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int32_t window = from / to.window * to.window, positions = static_cast<int32_t>(to.positions);
  const int32_t columns = positions - window < to.window ? positions - window : to.window;
  const int32_t begin = window + columns / kWarp * warp / warps * kWarp,
                end = window + columns / kWarp * (warp + 1) / warps * kWarp;
  const Kinds kinds = Kinds::of(starts, to);
  int32_t* const seen = sorted.seen + warp * kKinds;

  for (int kind = lane; kind < kKinds; kind += kWarp) seen[kind] = 0;
  __syncwarp();
  for_each_column(starts, begin, end, [&](const SortedColumn& column) { atomicAdd(seen + kinds.of(column), 1); });
  __syncthreads();
  for (int kind = threadIdx.x; kind < kKinds; kind += blockDim.x) {
    int32_t sum = 0;
    for (int other = 0; other < warps; ++other) {
      const int32_t count = sorted.seen[other * kKinds + kind];
      sorted.seen[other * kKinds + kind] = sum;
      sum += count;
    }
    sorted.before[kind] = sum;
  }
  __syncthreads();
  if (warp == 0) sum_kinds(sorted.before);
  __syncthreads();
  const int32_t heavy = columns - sorted.before[kHeavy];
  for_each_column(starts, begin, end, [&](const SortedColumn& own) {
    const int kind = kinds.of(own);
    const unsigned same = __match_any_sync(kAllLanes, kind);
    const int32_t before = seen[kind];
    const int left = __popc(same & ((1u << lane) - 1));
    __syncwarp();
    if (left == 0) seen[kind] = before + __popc(same);
    __syncwarp();
    const int32_t at = window + position_of(sorted.before[kind] + before + left, columns, heavy) - from;
    if (at >= 0 && at < kWindow) sorted.of[at] = own;
  });
  __syncthreads();
}

}  // namespace neuroada::cuda
