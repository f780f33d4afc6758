// The dense product and the bypass in one, as linear_fwd and linear_bwd_input share it:
//
//   out[t, r] = sum_c x[t, c] W(r, c) + bias[r] + sum over the entries (c, v) of row r of v x[t, c]
//
// A block of tokens is staged once, transposed; the product reads it as its left operand and the bypass
// gathers from it. Both are summed in the accumulate type, and out is rounded and written once.
#pragma once

#include "product_tile.h"
#include "staging.h"

namespace neuroada::cpu::NEUROADA_ISA {

// Rows and cells of W that are multiplied by all tokens of a block before the next are: as many as the
// second cache holds beside the staged tokens.
inline constexpr int64_t kBlockRows = 8 * kTileSums, kBlockCells = 512;
// Tokens of a block: at least so many where threads share few tokens, since each block reads all of W,
// and at most so many, or as take this much staged.
inline constexpr int64_t kLeastTokens = 96, kMostTokens = 256, kStagedBytes = 2 << 20;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t value, int64_t step) { return ceil_div(value, step) * step; }

template <class T>
struct Product {
  int64_t tokens, columns, rows;
  const T* x;  // [tokens, columns]
  int64_t x_stride;
  const T* bias;  // [rows], or null
  T* out;         // [tokens, rows]
  int64_t out_stride;
};

// Blocks of tokens, all about as long; where they do not share out evenly among the threads, the rows
// are cut into ranges too. No sum depends on either.
struct ProductTasks {
  int64_t block_tokens, blocks, ranges, rows;

  ProductTasks(int64_t tokens, int64_t rows, int64_t staged_bytes_a_token, int64_t lanes, int64_t threads)
      : rows(rows) {
    const int64_t fit = kStagedBytes / std::max<int64_t>(staged_bytes_a_token, 1) / lanes * lanes;
    const int64_t most = std::max(lanes, std::min(kMostTokens, fit));
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
  // How much of the threads' time is lost to an uneven share, in eighths.
  int64_t idle_eighths(int64_t threads) const {
    const int64_t tasks = count(), slots = round_up(std::max<int64_t>(tasks, 1), threads);
    return (slots - tasks) * 8 / slots;
  }
  int64_t boundary(int64_t range) const {
    return range == ranges ? rows : rows * range / ranges / kTileSums * kTileSums;
  }
};

// Where a thread's block of tokens, and the totals of a block of rows, lie.
template <class Cell>
struct ProductScratch {
  using A = typename Cell::A;
  int64_t cells, block_tokens;
  Scratch<A> staged, totals;
  Scratch<typename Cell::Element> weight;

  ProductScratch(int64_t columns, int64_t block_tokens, int64_t weight_elements)
      : cells(ceil_div(columns, Cell::kDepth)),
        block_tokens(block_tokens),
        staged(make_scratch<A>(cells * block_tokens)),
        totals(make_scratch<A>(kBlockRows * block_tokens)),
        weight(make_scratch<typename Cell::Element>(weight_elements)) {}

  // The panel whose first token is the block's `token`.
  A* panel(int64_t token) const { return staged.get() + token * cells; }
};

// Asks for `count` elements of a row that is read soon, into the second cache.
template <class T>
inline void prefetch_row(const T* row, int64_t count) {
  for (int64_t c = 0; c < count; c += 64 / sizeof(T)) __builtin_prefetch(row + c, 0, 2);
}

// The dense product's total for every token, and the bias.
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

// Calls f(first token, tokens, vectors) for the panels that the tokens of a block are staged in: as long
// as a tile allows, but rather two of two vectors than one of three and one of one.
template <class A, class F>
void each_panel(int64_t tokens, F&& f) {
  constexpr int64_t lanes = kLanes<A>;
  for (int64_t t = 0; t < tokens;) {
    const int64_t left = ceil_div(tokens - t, lanes);
    const int64_t vectors = std::min<int64_t>(left == kTileVectors + 1 ? (left + 1) / 2 : left, kTileVectors);
    const int64_t count = std::min(tokens - t, vectors * lanes);
    if (vectors == 1) f(t, count, std::integral_constant<int, 1>{});
    if (vectors == 2) f(t, count, std::integral_constant<int, 2>{});
    if constexpr (kTileVectors == 3) {
      if (vectors == 3) f(t, count, std::integral_constant<int, 3>{});
    }
    t += vectors * lanes;
  }
}

// Where a block of W begins, and how much of it there is.
struct BlockPlace {
  int64_t row, width, cell, cells;
};

// The totals of `width` rows from `row` on, for `tokens` tokens of the block.
template <class Cell, class Weight>
void multiply_rows(const ProductScratch<Cell>& scratch, const Weight& weight, int64_t row, int64_t width,
                   int64_t tokens) {
  using A = typename Cell::A;
  const int64_t stride = scratch.block_tokens;
  if (scratch.cells == 0) std::fill_n(scratch.totals.get(), width * stride, A{0});
  for (int64_t c = 0; c < scratch.cells; c += kBlockCells) {
    const BlockPlace place{row, width, c, std::min(kBlockCells, scratch.cells - c)};
    const auto block = weight.block(place, tokens, scratch.weight.get());
    each_panel<A>(tokens, [&](int64_t t, int64_t, auto vectors) {
      const A* x = scratch.panel(t) + c * vectors * kLanes<A>;
      for (int64_t r = 0; r < width; r += kTileRows<vectors>) {
        A* total = scratch.totals.get() + r * stride + t;
        multiply_tile<Cell, vectors, Weight::kPacked>({x, block.from(r), place.cells, total, stride, c == 0});
      }
    });
  }
}

// One block of tokens, one range of rows.
template <class T, class Cell, class Weight, class Rows>
void run_task(const Product<T>& p, const Weight& weight, const Rows& rows, const ProductTasks& tasks, int64_t task,
              const ProductScratch<Cell>& scratch) {
  using A = accumulate_t<T>;
  const int64_t start = tasks.block(task) * tasks.block_tokens, last = tasks.last_row(task);
  const int64_t tokens = std::min(tasks.block_tokens, p.tokens - start);
  const T* x = p.x + start * p.x_stride;
  T* out = p.out + start * p.out_stride;
  const T* none = nullptr;
  each_panel<A>(tokens, [&](int64_t t, int64_t count, auto vectors) {
    stage_transposed<Cell, vectors * kLanes<A>>(x + t * p.x_stride, p.x_stride, count, 0, p.columns, p.columns,
                                                scratch.panel(t));
  });
  for (int64_t r = tasks.first_row(task); r < last; r += kBlockRows) {
    const int64_t width = std::min(kBlockRows, last - r);
    multiply_rows(scratch, weight, r, width, tokens);
    each_panel<A>(tokens, [&](int64_t t, int64_t count, auto vectors) {
      const DenseTerm<T> dense{{p.bias}, scratch.totals.get() + t, tasks.block_tokens, r};
      gather_rows<T, Cell, vectors * kLanes<A>>(rows, scratch.panel(t), r, r + width, count, none, 0, dense,
                                                out + t * p.out_stride, p.out_stride);
    });
  }
}

template <class T, class Weight, class Rows>
void multiply_and_gather(const Product<T>& p, const Weight& weight, const Rows& rows, const Executor& all) {
  using Cell = typename ProductCell<T>::type;
  using A = accumulate_t<T>;
  constexpr int64_t kProductsABypass = 8;  // multiply-adds of the product in the time of one of a gather
  const Executor executor = all.limited(p.tokens * (p.columns + p.rows * (1 + p.columns / kProductsABypass)));
  const int64_t bytes = ceil_div(p.columns, Cell::kDepth) * static_cast<int64_t>(sizeof(A));
  const ProductTasks tasks(p.tokens, p.rows, bytes, kLanes<A>, executor.threads);
  const int64_t parts = std::min(tasks.count(), executor.threads);
  executor.parallel(parts, [&](int64_t part) {
    const ProductScratch<Cell> scratch(p.columns, tasks.block_tokens, Weight::kScratch);
    for (int64_t task = tasks.count() * part / parts; task < tasks.count() * (part + 1) / parts; ++task) {
      run_task(p, weight, rows, tasks, task, scratch);
    }
  });
}

}  // namespace neuroada::cpu::NEUROADA_ISA
