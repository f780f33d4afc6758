// Blocks of tokens, transposed into scratch as [column][block tokens], so that gathering a column
// for a block of tokens reads one contiguous run. Both gathers of the bypass, forward and towards
// the input, are one function over such a block.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "kernels.h"
#include "simd.h"

namespace neuroada::cpu::NEUROADA_ISA {

// Tokens in a block: at least one vector; `vectors` of them run side by side to hide latency and
// share each entry's index and delta.
template <class A, int vectors>
inline constexpr int kBlock = vectors * kLanes<A>;

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

// staged[c - first][i] = source[i, c] for the columns [first, last) and `tokens` <= block rows;
// the rest of the block becomes zero.
template <class A, int block, class T>
void stage_transposed(const T* source, int64_t stride, int64_t tokens, int64_t first, int64_t last, A* staged) {
  constexpr int lanes = kLanes<A>;
  int64_t c = first;
  for (; c + lanes <= last; c += lanes) {
    for (int64_t row = 0; row < block; row += lanes) {
      Vec<A> tile[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        tile[i] = row + i < tokens ? load(source + (row + i) * stride + c) : zero<A>();
      }
      transpose<A>(tile);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) store(staged + (c - first + i) * block + row, tile[i]);
    }
  }
  for (; c < last; ++c) {
    for (int64_t row = 0; row < block; ++row) {
      staged[(c - first) * block + row] = row < tokens ? widen(source[row * stride + c]) : A{0};
    }
  }
}

// The rows of a sparse matrix in ELL format, as index and delta hold them.
template <class A>
struct EllRows {
  const int32_t* column;
  const A* value;
  int64_t k;
  int64_t begin(int64_t row) const { return row * k; }
  int64_t end(int64_t row) const { return (row + 1) * k; }
};

// The rows of a sparse matrix in CSR format.
template <class A>
struct CsrRows {
  const int32_t* column;
  const A* value;
  const int32_t* start;
  int64_t begin(int64_t row) const { return start[row]; }
  int64_t end(int64_t row) const { return start[row + 1]; }
};

// out[t, r] = base[t, r] + bias[r] + sum over the entries (c, v) of row r of v staged[c][t], for the
// rows [first, last) and the first `tokens` of the block. Entries are added in their order.
template <class T, int block, class Rows>
void gather_rows(const Rows& rows, const accumulate_t<T>* staged, int64_t first, int64_t last, int64_t tokens,
                 const T* base, int64_t base_stride, const T* bias, T* out, int64_t out_stride) {
  using A = accumulate_t<T>;
  constexpr int lanes = kLanes<A>, vectors = block / lanes;
  for (int64_t r = first; r < last; r += lanes) {
    const int width = static_cast<int>(std::min<int64_t>(lanes, last - r));
    Vec<A> tile[vectors][lanes];
    for (int i = 0; i < lanes; ++i) {
      Vec<A> sum[vectors];
      const A start = i < width && bias != nullptr ? widen(bias[r + i]) : A{0};
      for (int v = 0; v < vectors; ++v) sum[v] = broadcast(start);
      if (i < width) {
        for (int64_t e = rows.begin(r + i), end = rows.end(r + i); e < end; ++e) {
          const int32_t column = rows.column[e];
          if (column < 0) continue;
          const A* gathered = staged + int64_t{column} * block;
          const Vec<A> value = broadcast(rows.value[e]);
#pragma GCC unroll 8
          for (int v = 0; v < vectors; ++v) sum[v] += value * load(gathered + v * lanes);
        }
      }
      for (int v = 0; v < vectors; ++v) tile[v][i] = sum[v];
    }
    for (int v = 0; v < vectors; ++v) {
      transpose<A>(tile[v]);
      for (int i = 0; i < lanes && v * lanes + i < tokens; ++i) {
        const int64_t t = v * lanes + i;
        T* target = out + t * out_stride + r;
        const T* onto = base == nullptr ? nullptr : base + t * base_stride + r;
        if (width == lanes) {
          store(target, onto == nullptr ? tile[v][i] : tile[v][i] + load(onto));
        } else {
          for (int j = 0; j < width; ++j) {
            narrow(onto == nullptr ? tile[v][i][j] : tile[v][i][j] + widen(onto[j]), target[j]);
          }
        }
      }
    }
  }
}

// How a gather over `tokens` tokens and `rows` rows is cut into tasks: by blocks of tokens, and
// where these are fewer than the threads, by ranges of rows too.
struct GatherTasks {
  int64_t blocks, ranges;
  GatherTasks(int64_t tokens, int64_t rows, int64_t block, int64_t threads)
      : blocks((tokens + block - 1) / block),
        ranges(blocks == 0 || blocks >= threads ? 1 : std::min((threads + blocks - 1) / blocks, (rows + 63) / 64)) {
    ranges = std::max<int64_t>(ranges, 1);
  }
  int64_t count() const { return blocks * ranges; }
};

}  // namespace neuroada::cpu::NEUROADA_ISA
