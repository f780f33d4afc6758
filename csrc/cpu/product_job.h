// The operands of a tile of the GEMM, in vector registers (product_tile.h) or AMX tiles
// (product_tile_amx.h).
#pragma once

#include "cells.h"

namespace neuroada::cpu::NEUROADA_ISA {

// A block of W: row r at cell c is at `at + r * row_step + c * cell_step`, in elements. In packed W, which does not use
// row_step, it is at `at + Cell::place(r) + c * cell_step`.
template <class Element>
struct WeightBlock {
  const Element* at = nullptr;
  int64_t row_step = 0, cell_step = 0;
  bool stays = false;  // keep the rows of a tile in L1 while they are multiplied by all tokens of a block
};

// One tile: total[r][i] = or += sum over `cells` of panel[c][i] W(row + r, c).
template <class Cell>
struct TileJob {
  using A = typename Cell::A;
  const A* panel;      // [cells][tokens of the panel]
  int64_t panel_step;  // to the next panel, where a panel has fewer tokens than the tile
  WeightBlock<typename Cell::Element> weight;
  int64_t row;
  int64_t cells;
  A* total;
  int64_t total_stride;
  bool overwrite;  // total, as beta = 0 does in BLAS; otherwise add to it
};

// Work interleaved with the GEMM, one step() every kCells cells: here none.
struct NothingAside {
  static constexpr bool kIdle = true;
  static constexpr int64_t kCells = INT64_MAX;
  void step() {}
};

}  // namespace neuroada::cpu::NEUROADA_ISA
