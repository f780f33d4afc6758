// Blocks of tokens, transposed into scratch as [column][block tokens], so that gathering a column
// for a block of tokens reads one contiguous run. Both gathers of the bypass, forward and dx,
// are one function over such a block.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

#include "cells.h"
#include "kernels.h"

namespace neuroada::cpu::NEUROADA_ISA {

// Tokens in a block. A long one shares each entry's index and delta among more tokens; a short one
// wastes less on few tokens, and keeps more columns in L2.
template <class A>
inline constexpr int kLongBlock = 128 / sizeof(A);
template <class A>
inline constexpr int kShortBlock = 64 / sizeof(A);
inline constexpr int64_t kLongBlockBytes = 256 << 10;

// Calls f with the block's length as a constant, chosen by the shape alone.
template <class A, class F>
void with_block(int64_t tokens, int64_t columns, F&& f) {
  const bool fits = columns * kLongBlock<A> * static_cast<int64_t>(sizeof(A)) <= kLongBlockBytes;
  if (tokens > kShortBlock<A> && fits) return f(std::integral_constant<int, kLongBlock<A>>{});
  return f(std::integral_constant<int, kShortBlock<A>>{});
}

struct FreeAligned {
  void operator()(void* p) const { std::free(p); }
};

template <class A>
using Scratch = std::unique_ptr<A[], FreeAligned>;

template <class A>
Scratch<A> make_scratch(int64_t count) {
  const size_t bytes = (static_cast<size_t>(std::max<int64_t>(count, 1)) * sizeof(A) + 63) / 64 * 64;
  void* p = std::aligned_alloc(64, bytes);
  if (p == nullptr) throw std::bad_alloc();
  return Scratch<A>(static_cast<A*>(p));
}

// Vectors of cells that one cache line of the source fills.
template <class Cell>
inline constexpr int kLineVectors = 64 / sizeof(typename Cell::Source) / Cell::kDepth / kLanes<typename Cell::A>;

// Transposes `line` vectors of kLanes rows each into staged. A row's cache line is read once: rows
// are often a power of two apart and then evict each other from L1.
template <class Cell, int block, int line>
inline void stage_tile(const typename Cell::Source* source, int64_t stride, int64_t tokens, typename Cell::A* staged) {
  using A = typename Cell::A;
  constexpr int lanes = kLanes<A>;
  Vec<A> tile[line][lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) {
#pragma GCC unroll 16
    for (int g = 0; g < line; ++g) {
      tile[g][i] = i < tokens ? Cell::load_row(source + i * stride + g * lanes * Cell::kDepth) : zero<A>();
    }
  }
#pragma GCC unroll 16
  for (int g = 0; g < line; ++g) {
    transpose<A>(tile[g]);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) store(staged + (g * lanes + i) * block, tile[g][i]);
  }
}

// Prefetches the cache line at `column` of each of `tokens` rows. The rows are too many streams for the
// hardware prefetchers, and too far apart for L1, so the lines go to L2.
//
// Always inlined, as all functions here that only prefetch: GCC considers them free of side effects and removes calls
// that it does not inline.
template <int for_writing, class T>
inline __attribute__((always_inline)) void prefetch_rows(const T* rows, int64_t stride, int64_t tokens,
                                                         int64_t column) {
  for (int64_t t = 0; t < tokens; ++t) __builtin_prefetch(rows + t * stride + column, for_writing, 2);
}

// staged[c][i] = cell c of source[i], for the cells of the columns [first, last) and `tokens` <= block
// rows; the rest of the block becomes zero. `columns` is the length of a row, up to which lines are
// prefetched. A cell begins at `first`.
template <class Cell, int block>
void stage_transposed(const typename Cell::Source* source, int64_t stride, int64_t tokens, int64_t first, int64_t last,
                      int64_t columns, typename Cell::A* staged) {
  using A = typename Cell::A;
  constexpr int lanes = kLanes<A>, line = kLineVectors<Cell>, width = lanes * Cell::kDepth;
  constexpr int64_t ahead = 4 * line * width;
  int64_t c = first;
  const auto place = [&](int64_t row) { return staged + (c - first) / Cell::kDepth * block + row; };
  for (; c + line * width <= last; c += line * width) {
    if (c + ahead < columns) prefetch_rows<0>(source, stride, tokens, c + ahead);
    for (int64_t row = 0; row < block; row += lanes) {
      stage_tile<Cell, block, line>(source + row * stride + c, stride, tokens - row, place(row));
    }
  }
  for (; c + width <= last; c += width) {
    if (c % (line * width) == 0 && c + ahead < columns) prefetch_rows<0>(source, stride, tokens, c + ahead);
    for (int64_t row = 0; row < block; row += lanes) {
      stage_tile<Cell, block, 1>(source + row * stride + c, stride, tokens - row, place(row));
    }
  }
  for (; c < last; c += Cell::kDepth) {
    for (int64_t row = 0; row < block; ++row) {
      *place(row) = row < tokens ? Cell::read(source + row * stride + c, last - c) : A{0};
    }
  }
}

// The rows of a sparse matrix in ELL format, as index and delta hold them.
template <class A>
struct EllRows {
  const int32_t* columns;
  const A* values;
  int64_t k;
  int32_t column(int64_t entry) const { return columns[entry]; }
  A value(int64_t entry) const { return values[entry]; }
  int64_t begin(int64_t row) const { return row * k; }
  int64_t end(int64_t row) const { return (row + 1) * k; }
};

// Vectors per cache line of the output.
template <class T>
inline constexpr int kOutVectors = kLineVectors<WideCell<T>>;

// target[j] = onto[j] + the j-th of `width` values, vector g of which is line[g * lanes].
template <class T>
inline void write_line(const Vec<accumulate_t<T>>* line, int width, const T* onto, T* target) {
  using A = accumulate_t<T>;
  constexpr int lanes = kLanes<A>;
  for (int g = 0; g < kOutVectors<T>; ++g) {
    const Vec<A> value = line[g * lanes];
    const int from = g * lanes;
    if (from + lanes <= width) {
      store(target + from, onto == nullptr ? value : value + load(onto + from));
    } else {
      for (int j = from; j < width; ++j) {
        narrow(onto == nullptr ? value[j - from] : value[j - from] + widen(onto[j]), target[j]);
      }
    }
  }
}

#if defined(__AVX512F__)
// target[i][j] = tile[j][i], for the `width` rows of the tile and `tokens` of its lanes. The values are rounded before
// the transpose, which then moves two per lane.
inline void write_pairs(const Vec<float>* tile, int width, int64_t tokens, BFloat16* target, int64_t stride) {
  constexpr int lanes = kLanes<float>;
  Vec<float> lines[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) lines[i] = narrow_pairs(tile[2 * i], tile[2 * i + 1]);
  transpose<float>(lines);
  if (width == 2 * lanes && tokens >= lanes) {
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) std::memcpy(target + i * stride, &lines[i], sizeof(lines[i]));
    return;
  }
  for (int64_t i = 0; i < std::min<int64_t>(lanes, tokens); ++i) {
    std::memcpy(target + i * stride, &lines[i], width * sizeof(BFloat16));
  }
}
#endif

// bias[row] for every token, or zero.
template <class T>
struct BiasTerm {
  using A = accumulate_t<T>;
  const T* bias;
  Vec<A> operator()(int64_t row, int) const { return broadcast(bias != nullptr ? widen(bias[row]) : A{0}); }
};

// A block of staged tokens, in panels of `panel` tokens, each [cell][panel], `step` elements apart. A gather prefetches
// columns from a block larger than kNearBytes (`prefetches`).
template <class Cell, int block, int panel = block>
struct StagedBlock {
  using A = typename Cell::A;
  static constexpr int kVectors = block / kLanes<A>;
  static constexpr int kSideBySide = panel / kLanes<A>;  // vectors
  const A* at;
  int64_t step = 0;
  bool prefetches = false;
  Vec<A> column(int32_t column, int v) const {
    return Cell::template column<panel>(at + v / kSideBySide * step, column, v % kSideBySide);
  }
  inline __attribute__((always_inline)) void prefetch_column(int32_t column) const {
    const A* cell = at + int64_t{column} / Cell::kDepth * panel;
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; v += std::min(kSideBySide, 64 / kVectorBytes)) {
      __builtin_prefetch(cell + v / kSideBySide * step + v % kSideBySide * kLanes<A>);
    }
  }
};

// out[t, r] = base[t, r] + term(r, t) + sum over the entries (c, v) of row r of v staged[c][t], for the
// rows [first, last) and the first `tokens` of the block. Entries are added in their order.
template <class T, class Rows, class Staged, class Term>
void gather_rows(const Rows& rows, const Staged staged, int64_t first, int64_t last, int64_t tokens, const T* base,
                 int64_t base_stride, const Term& term, T* out, int64_t out_stride) {
  using A = accumulate_t<T>;
  constexpr int lanes = kLanes<A>, vectors = Staged::kVectors, line = kOutVectors<T>;
  constexpr int64_t ahead = 16;  // entries
  const int64_t last_ahead = staged.prefetches && first < last ? rows.end(last - 1) - ahead : 0;
  Vec<A> tile[vectors][line * lanes];  // [block][a cache line of out]
  for (int64_t r = first; r < last; r += line * lanes) {
    const int width = static_cast<int>(std::min<int64_t>(line * lanes, last - r));
    prefetch_rows<1>(out, out_stride, tokens, r);
    for (int i = 0; i < width; ++i) {
      Vec<A> sum[vectors];
      for (int v = 0; v < vectors; ++v) sum[v] = zero<A>();
      for (int64_t e = rows.begin(r + i), end = rows.end(r + i); e < end; ++e) {
        if (e < last_ahead) staged.prefetch_column(std::max(rows.column(e + ahead), 0));
        const int32_t column = rows.column(e);
        if (column < 0) continue;
        const Vec<A> value = broadcast(rows.value(e));
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sum[v] += value * staged.column(column, v);
      }
      // The large term is added last: otherwise each product would be rounded at its scale.
      for (int v = 0; v < vectors; ++v) tile[v][i] = sum[v] + term(r + i, v);
    }
    for (int v = 0; v < vectors && v * lanes < tokens; ++v) {
#if defined(__AVX512F__)
      if constexpr (std::is_same_v<T, BFloat16>) {
        if (base == nullptr) {
          write_pairs(tile[v], width, tokens - v * lanes, out + v * lanes * out_stride + r, out_stride);
          continue;
        }
      }
#endif
      for (int g = 0; g < line; ++g) transpose<A>(tile[v] + g * lanes);
      for (int i = 0; i < lanes && v * lanes + i < tokens; ++i) {
        const int64_t t = v * lanes + i;
        const T* onto = base == nullptr ? nullptr : base + t * base_stride + r;
        write_line<T>(tile[v] + i, width, onto, out + t * out_stride + r);
      }
    }
  }
}

// How a gather over `tokens` tokens and `rows` rows is split into tasks: by runs of blocks of tokens,
// and if there are fewer blocks than threads, by ranges of rows too.
struct GatherTasks {
  int64_t blocks, runs, ranges;

  GatherTasks(int64_t tokens, int64_t rows, int64_t block, int64_t threads, int64_t most_ranges = INT64_MAX)
      : blocks(ceil_div(tokens, block)), runs(std::min(blocks, threads)), ranges(1) {
    constexpr int64_t fewest_rows = 64;
    if (blocks > 0 && blocks < threads)
      ranges = std::min(std::min(ceil_div(threads, blocks), rows / fewest_rows + 1), most_ranges);
  }

  int64_t count() const { return runs * ranges; }
  int64_t range(int64_t task) const { return task % ranges; }
  int64_t first_block(int64_t task) const { return blocks * (task / ranges) / runs; }
  int64_t last_block(int64_t task) const { return blocks * (task / ranges + 1) / runs; }
};

}  // namespace neuroada::cpu::NEUROADA_ISA
