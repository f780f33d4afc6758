// A tile of a block's sums in shared memory, from which the CTA writes them along their rows. The lanes that sum hold
// scattered columns, and would write 2 bytes of a sector each.
#pragma once

#include "staging.cuh"

namespace neuroada::cuda {

// Holds a group of columns as [column][V tokens], at their places.
struct OutTile {
  int32_t width;  // columns of a group, a multiple of 64; 0 if lanes write their sums
  bool vectors;   // rows are written 8 bytes at a time: they are aligned

  __host__ __device__ int64_t bytes() const { return int64_t{width} * 16; }
};

// Writes four adjacent columns of the tile as 8 bytes of each of `rows` rows, from `out` on.
template <class T, bool kClears>
__device__ __forceinline__ void write_four(Quad* tile, int32_t column, T* out, int64_t row_stride, int32_t rows) {
  const int32_t first = place(column);  // column + q is at first ^ q, for q up to 3
  Quad quad[4];
  NEUROADA_UNROLL
  for (int q = 0; q < 4; ++q) quad[q] = tile[first ^ q];
  NEUROADA_UNROLL
  for (int q = 0; q < 4; ++q) {
    if (kClears) tile[first ^ q] = Quad{};
  }
  NEUROADA_UNROLL
  for (int v = 0; v < kTokens<T>; ++v, out += row_stride) {
    const uint32_t which = v % 2 ? 0x7632 : 0x5410;
    const uint32_t word[2] = {bytes_of(quad[0].word[v / 2], quad[1].word[v / 2], which),
                              bytes_of(quad[2].word[v / 2], quad[3].word[v / 2], which)};
    if (v < rows) store_words(out, word);
  }
}

// out[v, c] = the v-th token of column c of the tile, for c < width, by the whole CTA. Stores are coalesced along the
// rows. With kClears, the columns that were read are set to zero.
template <class T, bool kClears>
__device__ __forceinline__ void write_tile(Quad* tile, const OutTile& shape, T* out, int64_t row_stride, int32_t rows,
                                           int32_t width) {
  const int32_t fours = shape.vectors ? width / 4 * 4 : 0;
  for (int32_t c = static_cast<int32_t>(threadIdx.x) * 4; c < fours; c += blockDim.x * 4) {
    T* const to = in_row(out, static_cast<uint32_t>(c));
    if (rows >= kTokens<T>) {  // nearly always
      write_four<T, kClears>(tile, c, to, row_stride, kTokens<T>);
    } else {
      write_four<T, kClears>(tile, c, to, row_stride, rows);
    }
  }
  for (int32_t c = fours + static_cast<int32_t>(threadIdx.x); c < width; c += blockDim.x) {
    const Quad quad = tile[place(c)];
    if (kClears) tile[place(c)] = Quad{};
    T* to = in_row(out, static_cast<uint32_t>(c));
    NEUROADA_UNROLL
    for (int v = 0; v < kTokens<T>; ++v, to += row_stride) {
      const uint16_t bits = static_cast<uint16_t>(quad.word[v / 2] >> (v % 2 * 16));
      if (v < rows) *to = T{bits};
    }
  }
}

}  // namespace neuroada::cuda
