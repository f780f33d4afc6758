// What a tile of the dense product reads and adds to, whichever registers it is in: vectors in
// product_tile.h, tiles of AMX in product_tile_amx.h.
#pragma once

#include "cells.h"

namespace neuroada::cpu::NEUROADA_ISA {

// A block of W: row r at cell c stands at `at + r * row_step + c * cell_step`, in elements, or where it is packed, with
// no use for row_step, at `at + Cell::place(r) + c * cell_step`.
template <class Element>
struct WeightBlock {
  const Element* at = nullptr;
  int64_t row_step = 0, cell_step = 0;
  bool stays = false;  // whether the rows of a tile are to stay in L1 while all tokens of a block go by
};

// What a tile reads and adds to: total[r][i] = or += sum over `cells` of panel[c][i] W(row + r, c).
template <class Cell>
struct TileJob {
  using A = typename Cell::A;
  const A* panel;      // [cells][tokens of the panel]
  int64_t panel_step;  // from it to the next panel, where one is shorter than the tile
  WeightBlock<typename Cell::Element> weight;
  int64_t row;
  int64_t cells;
  A* total;
  int64_t total_stride;
  bool overwrite;  // total, as beta = 0 does in BLAS; else it is added to
};

// What may be done aside: a step of it every kCells cells; or nothing, idle.
struct NothingAside {
  static constexpr bool kIdle = true;
  static constexpr int64_t kCells = INT64_MAX;
  void step() {}
};

}  // namespace neuroada::cpu::NEUROADA_ISA
