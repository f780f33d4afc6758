// A tile of the GEMM in vector registers. A lane is a token: x is transposed, as staging.h stages it for
// the gather of the bypass, and one cell of W at a time is broadcast to all lanes.
#pragma once

#include <algorithm>
#include <utility>

#include "product_job.h"

namespace neuroada::cpu::NEUROADA_ISA {

// Vector accumulators of a tile, which leave enough registers for its operands. Of the shapes that this
// allows, many vectors of tokens and few rows need the fewest loads: each broadcast is a load.
inline constexpr int kTileSums = kVectorBytes == 64 ? 24 : 12;
// For pairs, three vectors of tokens are faster than four, which read more of x for the same products.
template <class Cell>
inline constexpr int kTileVectors = Cell::kDepth == 2    ? 3
                                    : kVectorBytes == 64 ? 4
                                                         : 2;
// With one vector of tokens, half the sums: more rows would be more streams than the hardware prefetchers track.
template <int vectors>
inline constexpr int kTileRows = kTileSums / (vectors == 1 ? 2 : vectors);

// Vectors of tokens that are contiguous in each cell of a panel.
template <int vectors>
inline constexpr int kPanelVectors = vectors;

// Rows and cells of a block of W in the forward pass, which is multiplied by all tokens of a block before the next one:
// L2 holds two such blocks.
inline constexpr int64_t kBlockRows = 4 * kTileSums, kLeastTokens = 96;
// Part of the staged tokens may be in L3, from which tiles read them in long runs: another pass over W costs more.
inline constexpr int64_t kStagedBytes = kVectorBytes == 64 ? 4 << 20 : 2 << 20;
template <class Cell>
inline constexpr int64_t kBlockCells = 512 / Cell::kDepth;
// The FMA units limit the GEMM, so the copy of the next block is interleaved with it; and a panel of x stays in the
// cache while it is multiplied by the rows of a block.
inline constexpr bool kCopiesAside = true, kRowsFirst = false;
// Above this many staged bytes the gather prefetches columns.
inline constexpr int64_t kNearBytes = 256 << 10;
// AMX tiles need a multiple of 16 cells, a gap between rows of totals and a tile configuration; vector registers need
// none of these.
inline constexpr int64_t kTileCells = 1, kTotalGap = 0;
struct TileRegisters {};

// Calls f(0), f(1), ... with constants, without which the sums of a tile do not stay in registers across loops.
template <class F, int... i>
inline __attribute__((always_inline)) void unroll_over(F&& f, std::integer_sequence<int, i...>) {
  (f(std::integral_constant<int, i>{}), ...);
}
template <int n, class F>
inline __attribute__((always_inline)) void unroll(F&& f) {
  unroll_over(f, std::make_integer_sequence<int, n>{});
}

// The sums over the cells [begin, end), for the rows of a tile and a panel of `vectors` vectors of tokens,
// stored in `sums` (`overwrite`) or added to it. `packed` is the layout of W, see WeightBlock.
template <class Cell, int vectors, bool packed, bool overwrite, class Aside>
inline void sum_cells(const TileJob<Cell>& job, int64_t begin, int64_t end, typename Cell::A* sums, int64_t stride,
                      Aside& aside) {
  using A = typename Cell::A;
  using Element = typename Cell::Element;
  constexpr int lanes = kLanes<A>, tile_rows = kTileRows<vectors>;
  // Three rows share a pointer: an address is then a base plus at most twice a step, which needs few
  // registers. In packed W, four columns of pairs are contiguous in the order of Cell::place; of single cells, all are.
  constexpr int together = packed && tile_rows % 4 == 0 ? 4 : 3, pointers = (tile_rows + together - 1) / together;
  static_assert(!packed || Cell::kDepth == 1 || tile_rows % together == 0);
  const int64_t row_step = packed ? Cell::kDepth : job.weight.row_step;
  const int64_t cell_step = packed ? job.weight.cell_step : Cell::kDepth;
  const Element* rows[pointers];
  for (int i = 0; i < pointers; ++i) {
    const int64_t row = job.row + together * i;
    rows[i] = job.weight.at + (packed ? Cell::place(row) : row * row_step);
  }
  // Prefetch distance for the next tiles, where packed W is read in place: each cell is then a row of W, and these are
  // more streams than the hardware prefetchers track.
  constexpr int64_t ahead = packed && Aside::kIdle ? 128 / sizeof(Element) : 0;
  Vec<A> sum[tile_rows][vectors];
  const auto each_sum = [](auto&& f) __attribute__((always_inline)) {
    unroll<tile_rows>([&](auto r) __attribute__((always_inline)) {
      unroll<vectors>([&](auto v) __attribute__((always_inline)) { f(r, v); });
    });
  };
  each_sum([&](auto r, auto v) __attribute__((always_inline)) { sum[r][v] = zero<A>(); });
  for (int64_t c = begin; c < end;) {
    aside.step();
    for (const int64_t pause = Aside::kIdle ? end : std::min(c + Aside::kCells, end); c < pause; ++c) {
      if constexpr (ahead != 0) __builtin_prefetch(rows[0] + c * cell_step + ahead);
      Vec<A> x[vectors], value;
      unroll<vectors>([&](auto v)
                          __attribute__((always_inline)) { x[v] = load(job.panel + (c * vectors + v) * lanes); });
      each_sum([&](auto r, auto v) __attribute__((always_inline)) {
        if constexpr (v == 0)
          value = Cell::broadcast_weight(rows[r / together] + c * cell_step + r % together * row_step);
        Cell::add(sum[r][v], x[v], value);
      });
    }
  }
  each_sum([&](auto r, auto v) __attribute__((always_inline)) {
    A* place = sums + r * stride + v * lanes;
    store(place, overwrite ? sum[r][v] : load(place) + sum[r][v]);
  });
}

// The same, not inlined without AVX-512, where a tile leaves few free registers: inlined into the loops of its caller,
// GCC reloaded x, and even a counter, from memory for each product.
template <class Cell, int vectors, bool packed, bool overwrite, class Aside>
#ifndef __AVX512F__
__attribute__((noinline))
#endif
void sum_cells_apart(const TileJob<Cell>& job, int64_t begin, int64_t end, typename Cell::A* sums, int64_t stride,
                     Aside& aside) {
  sum_cells<Cell, vectors, packed, overwrite>(job, begin, end, sums, stride, aside);
}

// Short sums round less than one long sum: beyond Cell::kShortSum cells, a tile adds up short sums in a buffer before
// it adds them to the total.
template <class Cell, int vectors, bool packed, class Aside>
void multiply_tile(const TileJob<Cell>& job, Aside& aside) {
  using A = typename Cell::A;
  if (job.cells <= Cell::kShortSum) {
    if (job.overwrite)
      return sum_cells<Cell, vectors, packed, true>(job, 0, job.cells, job.total, job.total_stride, aside);
    return sum_cells<Cell, vectors, packed, false>(job, 0, job.cells, job.total, job.total_stride, aside);
  }
  constexpr int width = vectors * kLanes<A>;
  alignas(64) A sums[kTileRows<vectors> * width];
  sum_cells_apart<Cell, vectors, packed, true>(job, 0, Cell::kShortSum, sums, width, aside);
  for (int64_t c = Cell::kShortSum; c < job.cells; c += Cell::kShortSum) {
    sum_cells_apart<Cell, vectors, packed, false>(job, c, std::min(c + Cell::kShortSum, job.cells), sums, width, aside);
  }
  for (int r = 0; r < kTileRows<vectors>; ++r) {
    for (int i = 0; i < width; i += kLanes<A>) {
      A* place = job.total + r * job.total_stride + i;
      const Vec<A> sum = load(sums + r * width + i);
      store(place, job.overwrite ? sum : load(place) + sum);
    }
  }
}

}  // namespace neuroada::cpu::NEUROADA_ISA
