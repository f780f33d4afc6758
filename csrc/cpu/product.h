// The GEMM fused with the bypass, shared by linear_fwd and linear_bwd_input:
//
//   out[t, r] = sum_c x[t, c] W(r, c) + bias[r] + sum over the entries (c, v) of row r of v x[t, c]
//
// A block of tokens is staged once, transposed; the GEMM reads it as its left operand and the bypass
// gathers from it. Both are summed in the accumulate type, and out is rounded and written once.
#pragma once

#include "block_copy.h"
#include "staging.h"
#ifdef NEUROADA_AMX_TILES
#include "product_tile_amx.h"
#else
#include "product_tile.h"
#endif

namespace neuroada::cpu::NEUROADA_ISA {

// Tokens of a block: at most Weight::most_tokens(), and no more than fit into kStagedBytes. Splitting few tokens among
// threads makes at most ceil(tokens / kLeastTokens) blocks, since each block reads all of W.
inline constexpr int64_t kMostTokens = 256;

// A block of at most kFewTokens tokens is memory-bound: no copy is interleaved with the GEMM, and blocks of W may be
// wider, which memory reads faster. With more tokens, up to Weight::kSequentialTokens, tiles still read W in place
// where they can, which saves the copy. That must not change the cells of a block, and with them the order of
// summation, since the number of tokens of a block depends on the number of threads.
inline constexpr int64_t kFewTokens = 32;
inline bool is_short_block(int64_t tokens) { return tokens <= kFewTokens; }

template <class T>
struct Product {
  int64_t tokens, columns, rows;
  const T* x;  // [tokens, columns]
  int64_t x_stride;
  const T* bias;  // [rows], or null
  T* out;         // [tokens, rows]
  int64_t out_stride;
};

// Blocks of tokens of about equal length; where they do not divide evenly among the threads, the rows
// are split into ranges too. No sum depends on either.
struct ProductTasks {
  int64_t block_tokens, blocks, ranges, rows;

  ProductTasks(int64_t tokens, int64_t rows, int64_t most_tokens, int64_t staged_bytes_per_token, int64_t lanes,
               int64_t threads)
      : rows(rows) {
    const int64_t fit = kStagedBytes / std::max<int64_t>(staged_bytes_per_token, 1) / lanes * lanes;
    const int64_t most = std::max(lanes, std::min(most_tokens, fit));
    const int64_t wanted =
        std::max({ceil_div(tokens, most), std::min(threads, ceil_div(tokens, kLeastTokens)), int64_t{1}});
    block_tokens = std::max(round_up(ceil_div(tokens, wanted), lanes), lanes);
    blocks = ceil_div(tokens, block_tokens);
    const int64_t tiles = std::max<int64_t>(ceil_div(rows, kTileSums), 1);
    ranges = 1;
    while (ranges < std::min(threads, tiles) && idle_eighths(threads) > 1) ++ranges;
  }

  int64_t count() const { return blocks * ranges; }
  // Neighbouring tasks have the same rows, so that a thread finds them in its cache.
  int64_t block(int64_t task) const { return task % blocks; }
  int64_t first_row(int64_t task) const { return boundary(task / blocks); }
  int64_t last_row(int64_t task) const { return boundary(task / blocks + 1); }

 private:
  // The share of the threads' time that is idle due to imbalance, in eighths.
  int64_t idle_eighths(int64_t threads) const {
    const int64_t tasks = count(), slots = round_up(std::max<int64_t>(tasks, 1), threads);
    return (slots - tasks) * 8 / slots;
  }
  int64_t boundary(int64_t range) const {
    return range == ranges ? rows : rows * range / ranges / kTileSums * kTileSums;
  }
};

// Rows and cells of a block of W, and the elements per row of its copy.
struct BlockSize {
  int64_t rows, cells, elements_per_row;
  int64_t elements() const { return rows * elements_per_row; }
};

// Whether the copy of the next block of W is interleaved with the GEMM of the current one.
template <class Weight>
bool copies_aside(const ProductTasks& tasks) {
  if constexpr (kCopiesAside) return tasks.block_tokens > Weight::kSequentialTokens;
  return false;
}

// A thread's scratch: a block of tokens, the totals of a block of rows, and one or two blocks of W.
template <class Cell>
struct ProductScratch {
  using A = typename Cell::A;
  using Element = typename Cell::Element;
  int64_t cells, total_stride;
  BlockSize block;
  Scratch<A> staged, totals;
  Scratch<Element> weight;

  ProductScratch(int64_t columns, const ProductTasks& tasks, const BlockSize& block, int64_t blocks)
      : cells(round_up(ceil_div(columns, Cell::kDepth), kTileCells)),
        total_stride(tasks.block_tokens + kTotalGap),
        block(block),
        staged(make_scratch<A>(cells * tasks.block_tokens)),
        totals(make_scratch<A>(block.rows * total_stride)),
        weight(make_scratch<Element>(blocks * block.elements())) {}

  // The panel whose first token is the block's `token`.
  A* panel(int64_t token) const { return staged.get() + token * cells; }
};

// The GEMM's total for every token, plus the bias.
template <class T>
struct DenseTerm {
  using A = accumulate_t<T>;
  BiasTerm<T> bias;
  const A* totals;  // of the first token of the panel
  int64_t stride, first_row;
  Vec<A> operator()(int64_t row, int v) const {
    return load(totals + (row - first_row) * stride + v * kLanes<A>) + bias(row, v);
  }
};

// How many of `left` vectors of tokens the next tile takes: at most kTileVectors. kTileVectors + 1 are split into two
// tiles of about equal width.
template <class Cell>
int64_t tile_vectors(int64_t left) {
  constexpr int64_t most = kTileVectors<Cell>;
  return std::min(left == most + 1 ? (left + 1) / 2 : left, most);
}

// Calls f(vectors) with `vectors`, at most `most`, as a constant.
template <int most, class F>
void with_vectors(int64_t vectors, F&& f) {
  if constexpr (most > 1) {
    if (vectors < most) return with_vectors<most - 1>(vectors, f);
  }
  f(std::integral_constant<int, most>{});
}

// Splits the tokens of a block into tiles and calls f(first token, tokens, vectors) for each.
template <class Cell, class F>
void each_tile(int64_t tokens, F&& f) {
  constexpr int64_t lanes = kLanes<typename Cell::A>;
  for (int64_t t = 0; t < tokens;) {
    const int64_t vectors = tile_vectors<Cell>(ceil_div(tokens - t, lanes));
    const int64_t count = std::min(tokens - t, vectors * lanes);
    with_vectors<kTileVectors<Cell>>(vectors, [&](auto v) { f(t, count, v); });
    t += count;
  }
}

// Calls f(first token, tokens, vectors, tiles) for one tile, or for two of equal width: a gather loads an entry's
// column and delta once for all its tokens, and has registers for the sums of two tiles.
inline constexpr int kGatherTiles = 2;
template <class Cell, class F>
void each_gather(int64_t tokens, F&& f) {
  constexpr int64_t lanes = kLanes<typename Cell::A>;
  for (int64_t t = 0; t < tokens;) {
    const int64_t left = ceil_div(tokens - t, lanes), vectors = tile_vectors<Cell>(left);
    const bool two = left > vectors && tile_vectors<Cell>(left - vectors) == vectors;
    const int64_t count = std::min(tokens - t, (two ? kGatherTiles : 1) * vectors * lanes);
    with_vectors<kTileVectors<Cell>>(vectors, [&](auto v) {
      if (two) return f(t, count, v, std::integral_constant<int, kGatherTiles>{});
      return f(t, count, v, std::integral_constant<int, 1>{});
    });
    t += count;
  }
}

// A block of W: first row, rows (`width`), first cell, cells, and the rows of a full block.
struct BlockPlace {
  int64_t row, width, cell, cells, rows;
};

// The blocks of a range of rows, in the order in which they are multiplied: all cells of a block of rows, then the next
// rows.
struct BlockOrder {
  int64_t first, last, cells, rows, block_cells, across;

  BlockOrder(int64_t first, int64_t last, int64_t cells, const BlockSize& block)
      : first(first),
        last(last),
        cells(cells),
        rows(block.rows),
        block_cells(block.cells),
        across(std::max<int64_t>(ceil_div(cells, block_cells), 1)) {}

  int64_t count() const { return ceil_div(last - first, rows) * across; }
  BlockPlace at(int64_t number) const {
    const int64_t row = first + number / across * rows, cell = number % across * block_cells;
    return {row, std::min(rows, last - row), cell, std::min(block_cells, cells - cell), rows};
  }
};

// How often the GEMM of a block calls aside.step().
template <class Cell, class Aside>
int64_t count_steps(const BlockPlace& place, int64_t tokens) {
  int64_t tiles = 0;
  each_tile<Cell>(tokens, [&](int64_t, int64_t, auto vectors) { tiles += ceil_div(place.width, kTileRows<vectors>); });
  return tiles * ceil_div(place.cells, Aside::kCells);
}

// Adds a block's products to the totals of its rows, for `tokens` tokens.
template <class Cell, bool packed, class Aside>
void multiply_block(const ProductScratch<Cell>& scratch, const BlockPlace& place,
                    const WeightBlock<typename Cell::Element>& block, int64_t tokens, Aside& aside) {
  using A = typename Cell::A;
  const int64_t stride = scratch.total_stride;
  const auto multiply = [&](int64_t t, int64_t r, auto vectors) {
    constexpr int64_t width = kPanelVectors<vectors> * kLanes<A>;
    const A* x = scratch.panel(t) + place.cell * width;
    A* total = scratch.totals.get() + r * stride + t;
    multiply_tile<Cell, vectors, packed>(
        {x, scratch.cells * width, block, r, place.cells, total, stride, place.cell == 0}, aside);
  };
  if constexpr (kRowsFirst) {
    for (int64_t r = 0; r < place.width; r += kTileSums) {
      each_tile<Cell>(tokens, [&](int64_t t, int64_t, auto vectors) { multiply(t, r, vectors); });
    }
  } else {
    each_tile<Cell>(tokens, [&](int64_t t, int64_t, auto vectors) {
      for (int64_t r = 0; r < place.width; r += kTileRows<vectors>) multiply(t, r, vectors);
    });
  }
}

// Calls after_row_block(place) when the totals of a block of rows are complete. A block of W is read in place, or
// copied before it is multiplied.
template <class Cell, class Weight, class F>
void multiply_sequentially(const ProductScratch<Cell>& scratch, const Weight& weight, const BlockOrder& order,
                           int64_t tokens, F&& after_row_block) {
  NothingAside nothing;
  for (int64_t number = 0; number < order.count(); ++number) {
    const BlockPlace place = order.at(number);
    auto block = weight.in_place(place);
    if (block.at == nullptr) {
      weight.copy(place, scratch.weight.get()).finish();
      block = Weight::copied(place, scratch.weight.get());
    }
    block.stays &= tokens > kTileVectors<Cell> * kLanes<typename Cell::A>;
    multiply_block<Cell, Weight::kPacked>(scratch, place, block, tokens, nothing);
    if (place.cell + place.cells >= scratch.cells) after_row_block(place);
  }
}

// The same, with the copy of each block of W interleaved with the GEMM of the previous block.
template <class Cell, class Weight, class F>
void multiply_with_copies(const ProductScratch<Cell>& scratch, const Weight& weight, const BlockOrder& order,
                          int64_t tokens, F&& after_row_block) {
  const auto target = [&](int64_t number) { return scratch.weight.get() + number % 2 * scratch.block.elements(); };
  const auto copy_of = [&](int64_t number) {
    return number < order.count() ? weight.copy(order.at(number), target(number)) : BlockCopy<Weight>();
  };
  BlockCopy<Weight> copy = copy_of(0);
  for (int64_t number = 0; number < order.count(); ++number) {
    const BlockPlace place = order.at(number);
    copy.finish();
    copy = copy_of(number + 1);
    copy.share_out(count_steps<Cell, BlockCopy<Weight>>(place, tokens));
    multiply_block<Cell, Weight::kPacked>(scratch, place, Weight::copied(place, target(number)), tokens, copy);
    if (place.cell + place.cells >= scratch.cells) after_row_block(place);
  }
}

// One block of tokens, one range of rows.
template <class T, class Cell, class Weight, class Rows>
void run_task(const Product<T>& p, const Weight& weight, const Rows& rows, const ProductTasks& tasks, int64_t task,
              const ProductScratch<Cell>& scratch) {
  using A = accumulate_t<T>;
  const int64_t start = tasks.block(task) * tasks.block_tokens;
  const int64_t tokens = std::min(tasks.block_tokens, p.tokens - start);
  const T* x = p.x + start * p.x_stride;
  T* out = p.out + start * p.out_stride;
  const T* none = nullptr;
  each_tile<Cell>(tokens, [&](int64_t t, int64_t count, auto vectors) {
    constexpr int64_t width = kPanelVectors<vectors> * kLanes<A>;
    for (int64_t i = 0; i < vectors * kLanes<A>; i += width) {
      A* panel = scratch.panel(t + i);
      stage_transposed<Cell, width>(x + (t + i) * p.x_stride, p.x_stride, std::min(count - i, width), 0, p.columns,
                                    p.columns, panel);
      std::fill(panel + ceil_div(p.columns, Cell::kDepth) * width, panel + scratch.cells * width, A{0});
    }
  });
  const bool prefetches = scratch.cells * tasks.block_tokens * static_cast<int64_t>(sizeof(A)) > kNearBytes;
  const auto gather = [&](const BlockPlace& place) {
    each_gather<Cell>(tokens, [&](int64_t t, int64_t count, auto vectors, auto tiles) {
      constexpr int width = kPanelVectors<vectors> * kLanes<A>;
      const StagedBlock<Cell, tiles * vectors * kLanes<A>, width> staged{scratch.panel(t), scratch.cells * width,
                                                                         prefetches};
      const DenseTerm<T> dense{{p.bias}, scratch.totals.get() + t, scratch.total_stride, place.row};
      gather_rows<T>(rows, staged, place.row, place.row + place.width, count, none, 0, dense, out + t * p.out_stride,
                     p.out_stride);
    });
  };
  [[maybe_unused]] const TileRegisters registers;
  const BlockOrder order(tasks.first_row(task), tasks.last_row(task), scratch.cells, scratch.block);
  if constexpr (kCopiesAside) {
    if (copies_aside<Weight>(tasks)) return multiply_with_copies(scratch, weight, order, tokens, gather);
  }
  multiply_sequentially(scratch, weight, order, tokens, gather);
}

// Calls f(element) with an element of the dtype; AMX tiles multiply bfloat16 only.
template <class F>
void with_product_dtype([[maybe_unused]] DType dtype, F&& f) {
#ifdef NEUROADA_AMX_TILES
  f(BFloat16{});
#else
  with_dtype(dtype, f);
#endif
}

template <class T, class Weight, class Rows>
void multiply_and_gather(const Product<T>& p, const Weight& weight, const Rows& entries, const Executor& all) {
  using Cell = typename ProductCell<T>::type;
  using A = accumulate_t<T>;
  constexpr int64_t kProductsABypass = 8;  // multiply-adds of the GEMM in the time of one of the gather
  const Executor executor = all.limited(p.tokens * (p.columns + p.rows * (1 + p.columns / kProductsABypass)));
  const int64_t bytes = ceil_div(p.columns, Cell::kDepth) * static_cast<int64_t>(sizeof(A));
  const ProductTasks tasks(p.tokens, p.rows, Weight::most_tokens(bytes), bytes, kLanes<A>, executor.threads);
  executor.parallel_ranges(tasks.count(), [&](int64_t begin, int64_t end) {
    const int64_t blocks = copies_aside<Weight>(tasks) ? 2 : 1;
    const ProductScratch<Cell> scratch(p.columns, tasks, weight.block(tasks.block_tokens), blocks);
    for (int64_t task = begin; task < end; ++task) run_task(p, weight, entries, tasks, task, scratch);
  });
}

}  // namespace neuroada::cpu::NEUROADA_ISA
