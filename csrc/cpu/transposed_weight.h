// W for the GEMM of the backward pass in AMX tiles: a block is transposed to [column][neuron], so that neurons
// are contiguous, as columns are in the forward pass.
#pragma once

#include "product.h"

namespace neuroada::cpu::NEUROADA_ISA {

template <class T>
struct BackwardWeight {
  static_assert(std::is_same_v<T, BFloat16>);
  using Source = BFloat16;
  using Cell = PairCell;
  using Element = BFloat16;
  static constexpr bool kPacked = false;
  // Cells of a block: few enough that the columns of a tile stay in L1 while they are multiplied by all tokens.
  static constexpr int64_t kCells = 128;
  // A cache line more than a block's row, so that the rows of a tile lie in different sets of the cache.
  static constexpr int64_t kStep = kCells * Cell::kDepth + 64 / sizeof(Element);
  static constexpr int64_t kLine = 64 / sizeof(Source), kLineStep = kLine * kStep;  // a line of each of 32 neurons

  const BFloat16* weight;  // [d_out, d_in]
  int64_t stride, d_out;

  // Each block of tokens transposes all of W: twice as many tokens where half of L2 (1 MB) holds them.
  static int64_t most_tokens(int64_t staged_bytes_per_token) {
    return 2 * kMostTokens * staged_bytes_per_token <= 1 << 20 ? 2 * kMostTokens : kMostTokens;
  }
  // Many columns: those of a row of W are contiguous, and memory reads long runs faster. No more than have their
  // totals in L2.
  static BlockSize block(int64_t tokens) { return {tokens > kMostTokens ? 256 : 512, kCells, kStep}; }

  WeightBlock<Element> in_place(const BlockPlace&) const { return {}; }
  static WeightBlock<Element> copied(const BlockPlace&, const Element* scratch) {
    return {scratch, kStep, Cell::kDepth, true};
  }

  // Returns the copy of the whole squares; the rest of the block, and zeros up to whole tiles, are written here.
  BlockCopy<BackwardWeight> copy(const BlockPlace& b, Element* scratch) const {
    const int64_t neuron = b.cell * Cell::kDepth, there = std::min(b.cells * Cell::kDepth, d_out - neuron);
    const int64_t lines = b.width / kLine, runs = there / kLine;
    const BFloat16* source = weight + neuron * stride + b.row;
    for (int64_t c = 0; c < round_up(b.width, kTileSums); ++c) {
      Element* target = scratch + c * kStep;
      int64_t n = c < lines * kLine ? runs * kLine : 0;
      for (; c < b.width && n < there; ++n) target[n] = source[n * stride + c];
      std::fill(target + n, target + b.cells * Cell::kDepth, Element{});
    }
    return {*this, {source, scratch, kLine * stride, kLine, runs, lines}};
  }

  // No prefetching: for 32 rows at once the requests only delay each other.
  template <int locality>
  void prefetch_line(const BFloat16*) const {}

  // target[c][n] = line[n][c], for 32 of each. Pairs of neurons are interleaved within 16 bytes, which puts groups
  // of four columns alternately into the two vectors.
  inline __attribute__((always_inline)) void copy_line(const BFloat16* line, Element* target) const {
    constexpr int lanes = kLanes<float>;
    Vec<float> pairs[2][lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      const __m512i low = _mm512_loadu_si512(line + 2 * i * stride);
      const __m512i high = _mm512_loadu_si512(line + (2 * i + 1) * stride);
      pairs[0][i] = (Vec<float>)_mm512_unpacklo_epi16(low, high);
      pairs[1][i] = (Vec<float>)_mm512_unpackhi_epi16(low, high);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      transpose<float>(pairs[half]);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        const int column = i / 4 * 8 + half * 4 + i % 4;
        std::memcpy(target + column * kStep, &pairs[half][i], sizeof(pairs[half][i]));
      }
    }
  }
};

}  // namespace neuroada::cpu::NEUROADA_ISA
