// Sorts the columns of a window by their number of connections: a counting sort in shared memory. Every CTA of a window
// repeats it and keeps its own kWindow positions: that is little work compared to writing their connections, which the
// CTAs share.
#pragma once

#include "column_entries.cuh"
#include "plan.cuh"

namespace neuroada::cuda {

// A column, d_in if none, and its connections [begin, end).
struct SortedColumn {
  int32_t column, begin, end;

  __device__ __forceinline__ int32_t count() const { return end - begin; }
};

// SortKeys are the sort keys of columns: more connections come first, then positions without a column, then heavy
// columns. If the neurons come in several tiles, a kind combines two counts, and there are more kinds.
struct SortKeys {
  static constexpr int kOfOne = 128, kOfTwo = 1024;
  static constexpr int kLevels = 31;  // per count, if there are two
  static_assert(kLevels * kLevels <= kOfTwo - 2);

  int number;     // of kinds; the last two are for no column and for heavy ones
  int32_t first;  // neurons of the first tile times k, or 0 if there is one count
  int64_t d_in;
  int32_t most[2];  // connections of a light column, in the first tile and in the others; or in total
  int coarse[2];    // a level is 2^coarse counts, or twice as many

  // Windows of many columns are sorted by two counts, so that adjacent lanes have similar counts in the first tile and
  // in the others.
  __host__ __device__ static bool by_tile(const ColumnEntries& to) { return to.tiles > 1 && to.window > kWindow; }
  __host__ __device__ static int number_of(const ColumnEntries& to) { return by_tile(to) ? kOfTwo : kOfOne; }

  // `width` is that of a tile times k.
  __device__ __forceinline__ static SortKeys of(int64_t d_in, const ColumnEntries& to, int64_t width) {
    SortKeys kinds{number_of(to), 0, d_in, {to.light * to.tiles, 0}, {0, 0}};
    if (by_tile(to)) {
      kinds.first = width < INT32_MAX ? static_cast<int32_t>(width) : INT32_MAX;
      kinds.most[0] = to.light;
      kinds.most[1] = to.light * (to.tiles - 1);
      NEUROADA_UNROLL
      for (int i = 0; i < 2; ++i) {
        // Few columns have more than three quarters of the maximum: these share one level.
        while ((kinds.most[i] / 4 * 3 + 1) / 2 >> kinds.coarse[i] >= kLevels) ++kinds.coarse[i];
      }
    } else {
      while (kinds.most[0] >> kinds.coarse[0] >= kinds.no_column()) ++kinds.coarse[0];
    }
    return kinds;
  }
  __device__ __forceinline__ int no_column() const { return number - 2; }
  __device__ __forceinline__ int heavy() const { return number - 1; }

  __device__ __forceinline__ int level(int32_t count, int which) const {
    const int32_t level = (count + 1) / 2 >> coarse[which];
    return level < kLevels ? level : kLevels - 1;
  }
  // The kind of a column whose connections from `middle` on are not in the first tile. Where the first count changes,
  // the second reverses its direction, and so changes little.
  __device__ __forceinline__ int of(const SortedColumn& column, int32_t middle) const {
    if (column.column >= d_in) return no_column();
    const int32_t count = column.count() > 0 ? column.count() : 0;
    if (first == 0) return count > most[0] ? heavy() : (most[0] - count) >> coarse[0];
    const int32_t before = count > 0 ? middle - column.begin : 0, behind = count - before;
    if (before > most[0] || behind > most[1]) return heavy();
    const int of_first = level(before, 0), of_others = level(behind, 1);
    return (kLevels - 1 - of_first) * kLevels + (of_first % 2 == 0 ? of_others : kLevels - 1 - of_others);
  }
};

struct SortedColumns {
  SortedColumn* of;  // [kWindow]
  int32_t* chunks;   // [kinds / kWarp] columns of all kinds before a chunk of kWarp kinds
  int32_t* before;   // [kinds] columns of the previous kinds in the same chunk
  int32_t* seen;     // [warps, kinds] columns of each kind in previous warps, plus the warp's own so far
  uint16_t* kind;    // [window] of each column

  // A multiple of 16.
  __host__ __device__ static int64_t bytes(int64_t threads, const ColumnEntries& to) {
    const int64_t kinds = SortKeys::number_of(to);
    return kWindow * int64_t{sizeof(SortedColumn)} +
           (kWarp + (1 + threads / kWarp) * kinds) * int64_t{sizeof(int32_t)} + to.window * int64_t{sizeof(uint16_t)};
  }
  __device__ __forceinline__ static SortedColumns in_shared(const ColumnEntries& to) {
    const int kinds = SortKeys::number_of(to);
    SortedColumn* const of = reinterpret_cast<SortedColumn*>(shared_quads());
    int32_t* const chunks = reinterpret_cast<int32_t*>(of + kWindow);
    int32_t* const before = chunks + kWarp;
    int32_t* const seen = before + kinds;
    return {of, chunks, before, seen, reinterpret_cast<uint16_t*>(seen + blockDim.x / kWarp * kinds)};
  }
  // Columns of all kinds before `kind`; valid after sum_kinds.
  __device__ __forceinline__ int32_t before_kind(int kind) const { return chunks[kind / kWarp] + before[kind]; }
};

struct ColumnStarts {
  const int32_t* plan;
  int64_t d_in;
  int32_t live;

  __device__ __forceinline__ SortedColumn column(int32_t column) const {
    if (column >= d_in) return {static_cast<int32_t>(d_in), 0, -1};
    return {column, start_of_column(plan, live, column), start_of_column(plan, live, column + 1)};
  }
  __device__ __forceinline__ const int32_t* entries() const { return entries_of_plan(plan, d_in); }
};

// middle[i] = the first of the ascending connections of a column that is at least `least`; for several columns at once.
template <int N>
__device__ __forceinline__ void find_middles(const int32_t* entry, const SortedColumn (&column)[N], int32_t least,
                                             int32_t (&middle)[N]) {
  int32_t end[N], longest = 0;
  NEUROADA_UNROLL
  for (int i = 0; i < N; ++i) {
    middle[i] = column[i].begin;
    end[i] = column[i].end;
    longest = longest < column[i].count() ? column[i].count() : longest;
  }
  NEUROADA_ROLLED
  for (; longest > 0; longest /= 2) {
    int32_t at[N], found[N];
    NEUROADA_UNROLL
    for (int i = 0; i < N; ++i) {
      at[i] = middle[i] + (end[i] - middle[i]) / 2;
      found[i] = middle[i] < end[i] ? entry[at[i]] : 0;
    }
    NEUROADA_UNROLL
    for (int i = 0; i < N; ++i) {
      if (middle[i] >= end[i]) continue;
      if (found[i] < least) {
        middle[i] = at[i] + 1;
      } else {
        end[i] = at[i];
      }
    }
  }
}

// Writes the kinds of a warp's columns [begin, end), 32 at a time, to `kind`, and counts each kind in `seen`. Loads of
// several columns are in flight at once.
__device__ __forceinline__ void count_kinds(const ColumnStarts& starts, const SortKeys& kinds, int32_t begin,
                                            int32_t end, uint16_t* kind, int32_t* seen) {
  constexpr int kAtOnce = 8;
  const int32_t lane = threadIdx.x % kWarp;
  for (int32_t c = begin; c < end; c += kAtOnce * kWarp) {
    SortedColumn column[kAtOnce];
    int32_t middle[kAtOnce] = {};
    NEUROADA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      column[i] = {static_cast<int32_t>(starts.d_in), 0, -1};
      if (c + i * kWarp < end) column[i] = starts.column(c + i * kWarp + lane);
    }
    if (kinds.first > 0) find_middles(starts.entries(), column, kinds.first, middle);
    NEUROADA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (c + i * kWarp >= end) continue;
      const int own = kinds.of(column[i], middle[i]);
      kind[c - begin + i * kWarp + lane] = static_cast<uint16_t>(own);
      atomicAdd(seen + own, 1);
    }
  }
}

// Inclusive prefix sum over the lanes.
__device__ __forceinline__ int32_t sum_upto(int32_t value, int lane) {
  NEUROADA_UNROLL
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const int32_t other = __shfl_sync(kAllLanes, value, lane >= offset ? lane - offset : lane);
    value += lane >= offset ? other : 0;
  }
  return value;
}

// Exclusive prefix sums of each kind's count over the warps, and of the total counts over the kinds. A warp processes
// 32 kinds at a time, one per lane.
__device__ __forceinline__ void sum_kinds(const SortedColumns& sorted, int kinds) {
  constexpr int kAtOnce = 8;
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  for (int chunk = threadIdx.x / kWarp; chunk < kinds / kWarp; chunk += warps) {
    const int kind = chunk * kWarp + lane;
    int32_t sum = 0;
    for (int from = 0; from < warps; from += kAtOnce) {
      int32_t count[kAtOnce];
      NEUROADA_UNROLL
      for (int i = 0; i < kAtOnce; ++i) count[i] = from + i < warps ? sorted.seen[(from + i) * kinds + kind] : 0;
      NEUROADA_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        if (from + i < warps) sorted.seen[(from + i) * kinds + kind] = sum;
        sum += count[i];
      }
    }
    const int32_t upto = sum_upto(sum, lane);
    sorted.before[kind] = upto - sum;
    if (lane == kWarp - 1) sorted.chunks[chunk] = upto;
  }
  __syncthreads();
  if (threadIdx.x < kWarp) {
    const int32_t sum = lane < kinds / kWarp ? sorted.chunks[lane] : 0;
    sorted.chunks[lane] = sum_upto(sum, lane) - sum;
  }
  __syncthreads();
}

// The position of the rank-th column of the order in a window of `columns` columns, `heavy` of them heavy. Heavy
// columns take the last lanes of the rounds of 32, round-robin; the others take what is left.
__device__ __forceinline__ int32_t position_of(int32_t rank, int32_t columns, int32_t heavy) {
  if (heavy == 0) return rank;
  const int32_t rounds = columns / kWarp, light = columns - heavy;
  if (rank >= light) return (rank - light) % rounds * kWarp + (kWarp - 1 - (rank - light) / rounds);
  // The first `more` rounds have one heavy column more.
  const int32_t more = heavy % rounds, least = kWarp - 1 - heavy / rounds, left = rank - more * least;
  if (left < 0) return rank / least * kWarp + rank % least;
  return (more + left / (least + 1)) * kWarp + left % (least + 1);
}

// Finds the columns at the positions from `from` on, by the whole CTA. A warp has adjacent columns, and columns of one
// kind stay in ascending order: the result is deterministic.
__device__ __forceinline__ void sort_columns(const ColumnStarts& starts, const ColumnEntries& to, int64_t width,
                                             int32_t from, const SortedColumns& sorted) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int32_t window = from / to.window * to.window, positions = static_cast<int32_t>(to.positions);
  const int32_t columns = positions - window < to.window ? positions - window : to.window;
  const int32_t begin = columns / kWarp * warp / warps * kWarp, end = columns / kWarp * (warp + 1) / warps * kWarp;
  const SortKeys kinds = SortKeys::of(starts.d_in, to, width);
  int32_t* const seen = sorted.seen + warp * kinds.number;

  for (int kind = lane; kind < kinds.number; kind += kWarp) seen[kind] = 0;
  __syncwarp();
  count_kinds(starts, kinds, window + begin, window + end, sorted.kind + begin, seen);
  __syncthreads();
  sum_kinds(sorted, kinds.number);
  const int32_t heavy = columns - sorted.before_kind(kinds.heavy());
  for (int32_t c = begin; c < end; c += kWarp) {
    const int kind = sorted.kind[c + lane];
    const unsigned same = __match_any_sync(kAllLanes, kind);
    const int32_t before = seen[kind];
    const int left = __popc(same & ((1u << lane) - 1));
    __syncwarp();
    if (left == 0) seen[kind] = before + __popc(same);
    __syncwarp();
    const int32_t at = window + position_of(sorted.before_kind(kind) + before + left, columns, heavy) - from;
    if (at >= 0 && at < kWindow) sorted.of[at] = starts.column(window + c + lane);
  }
  __syncthreads();
}

}  // namespace neuroada::cuda
