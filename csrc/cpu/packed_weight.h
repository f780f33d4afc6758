// W for the GEMM of the backward pass in vector registers: a block is [neuron][column], or [pair of
// neurons][column], with the columns in the order of Cell::place.
#pragma once

#include "product.h"

namespace neuroada::cpu::NEUROADA_ISA {

template <class T>
struct BackwardWeight {
  using Source = T;
  using A = accumulate_t<T>;
  using Cell = typename ProductCell<T>::type;
  using Element = typename Cell::Element;
  static constexpr bool kPacked = true;
  static constexpr int64_t kLine = 64 / sizeof(T), kLineStep = kLine * Cell::kDepth;
  static constexpr bool kInPlace = std::is_same_v<T, Element> && Cell::kDepth == 1;
  static constexpr int64_t kSequentialTokens = !kInPlace ? kFewTokens : kVectorBytes == 64 ? 96 : 64;
  // A block's columns are whole tiles and whole lines, so that Cell::place of a column is within its cell.
  static constexpr int64_t kColumns = 96;
  static_assert(kColumns % kTileSums == 0 && kColumns % kLine == 0);

  const T* weight;  // [d_out, d_in]
  int64_t stride, d_out;

  static int64_t most_tokens(int64_t) { return kMostTokens; }
  // Every row of W is in a page of its own, and a TLB miss costs as much as reading half a kilobyte: for few tokens,
  // whose totals are small, a block is long runs of few rows. No total is the sum of more than kSums blocks, so that it
  // rounds no worse than torch's GEMM. Where that needs more rows, runs are shorter, so that the copy of a block is no
  // larger than two blocks for many tokens, up to a d_out of hundreds of thousands. Between few and many tokens, runs
  // have twice the columns, and sums have the same neurons as for many, since the threads decide between the two.
  BlockSize block(int64_t tokens) const {
    constexpr BlockSize many{kColumns * Cell::kDepth, kBlockCells<Cell>, kBlockCells<Cell> * Cell::kDepth};
    if (tokens > kSequentialTokens) return many;
    if (!is_short_block(tokens)) return {2 * many.rows, many.cells, many.elements_per_row};
    constexpr int64_t kRun = 2048, kRows = 24, kSums = 170;
    const int64_t cells = std::max(kRows, ceil_div(ceil_div(d_out, Cell::kDepth), kSums));
    const int64_t run = std::clamp<int64_t>(2 * many.rows * many.cells / cells, kColumns, kRun);
    return {run / kColumns * kColumns, cells, cells * Cell::kDepth};
  }

  // The block in place, without a copy, or null. Past a row's end a tile reads the beginning of the next row, for
  // columns that are not used, but it must not read past the end of the last row.
  WeightBlock<Element> in_place(const BlockPlace& b) const {
    if constexpr (kInPlace) {
      const int64_t past_end = round_up(b.width, kTileSums) - b.width;
      const bool whole = b.cell + b.cells <= d_out && past_end <= (d_out - b.cell - b.cells) * stride;
      if (whole) return {weight + b.cell * stride + b.row, Cell::kDepth, stride};
    }
    return {};
  }
  static WeightBlock<Element> copied(const BlockPlace& b, const Element* scratch) { return {scratch, 0, step(b)}; }

  // Returns the copy of the whole lines; the rest of the block, and zeros up to whole tiles, are written here.
  BlockCopy<BackwardWeight> copy(const BlockPlace& b, Element* scratch) const {
    const int64_t lines = b.width / kLine, rows = std::min(b.cells, d_out / Cell::kDepth - b.cell);
    for (int64_t i = 0; i < b.cells; ++i) {
      const int64_t neuron = (b.cell + i) * Cell::kDepth, from = i < rows ? lines * kLine : 0;
      Element* target = scratch + i * step(b);
      for (int64_t c = from; c < round_up(b.width, kTileSums); ++c) {
        for (int64_t n = 0; n < Cell::kDepth; ++n) {
          Element& place = target[Cell::place(c) + n];
          if (c < b.width && neuron + n < d_out) {
            widen_into(weight[(neuron + n) * stride + b.row + c], place);
          } else {
            place = Element{};
          }
        }
      }
    }
    const T* source = weight + b.cell * Cell::kDepth * stride + b.row;
    return {*this, {source, scratch, Cell::kDepth * stride, step(b), rows, lines}};
  }

  template <int locality>
  inline __attribute__((always_inline)) void prefetch_line(const T* line) const {
    for (int64_t n = 0; n < Cell::kDepth; ++n) __builtin_prefetch(line + n * stride, 0, locality);
  }

  inline __attribute__((always_inline)) void copy_line(const T* line, Element* target) const {
    if constexpr (Cell::kDepth == 1) {
#pragma GCC unroll 16
      for (int64_t c = 0; c < kLine; c += kLanes<A>) store(target + c, load(line + c));
    } else {
      pack_pairs(line, line + stride, target);
    }
  }

 private:
  // From one cell of a block to the next.
  static int64_t step(const BlockPlace& b) { return b.rows * Cell::kDepth; }

#ifdef NEUROADA_AVX512_BF16
  // A line of pairs: target[place(i)] = low[i], target[place(i) + 1] = high[i]
  static void pack_pairs(const BFloat16* low, const BFloat16* high, BFloat16* target) {
    const __m512i lower = _mm512_loadu_si512(low), upper = _mm512_loadu_si512(high);
    _mm512_storeu_si512(target, _mm512_unpacklo_epi16(lower, upper));
    _mm512_storeu_si512(target + kLine, _mm512_unpackhi_epi16(lower, upper));
  }
#else
  static void pack_pairs(const T*, const T*, Element*);  // never called: there is no cell of pairs
#endif
};

}  // namespace neuroada::cpu::NEUROADA_ISA
