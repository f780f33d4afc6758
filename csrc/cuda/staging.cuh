// Blocks of tokens in shared memory, as [column][V tokens] of 16 bytes: a gather of one column is one
// 16-byte read that serves V tokens. All staged kernels share what stands here.
#pragma once

#include "device.cuh"

namespace neuroada::cuda {

// Of a CTA: 128 registers a thread, in which two groups of tokens fit without spilling.
constexpr int kMaxThreads = 512;

// V: the tokens of a group, 8 in sixteen bits and 4 in float32.
template <class T>
constexpr int kTokens = 16 / static_cast<int>(sizeof(T));

// How the columns of a matrix lie in shared memory: tiles of `width` columns, for each of the groups
// `stride` Quads, the last of which is a column of zeros.
struct Tiles {
  int32_t columns;  // of the matrix
  int32_t width;    // of a tile: all columns, or a multiple of 8
  int32_t zero;     // the place of the column of zeros
  int32_t stride;   // from a group to the next
  int32_t groups;
  bool vectors;  // rows are read 16 bytes at a time: they are aligned

  __host__ __device__ int64_t bytes() const { return int64_t{groups} * stride * 16; }
  __host__ __device__ bool single() const { return width == columns; }
};

// Where a column lies in its group. A lane that transposes writes V neighbouring columns in turn;
// exchanging them within blocks of 8 spreads the lanes over all banks.
__device__ __forceinline__ int place(int column) { return column ^ (column >> 3 & 7); }

// The place of `column` in the tile that starts at `first`, or that of the zeros; `inside` tells which.
__device__ __forceinline__ int place_in_tile(const Tiles& tiles, int32_t column, int32_t first, bool& inside) {
  const uint32_t offset = static_cast<uint32_t>(column) - static_cast<uint32_t>(first);
  inside = column >= 0 && column < tiles.columns && offset < static_cast<uint32_t>(tiles.width);
  return inside ? place(static_cast<int>(offset)) : tiles.zero;
}

// From V rows of V elements to V columns.
template <class T>
__device__ __forceinline__ Quad transposed(const Quad (&row)[kTokens<T>], int column) {
  Quad out;
  NEUROADA_UNROLL
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4) {
      out.word[w] = row[w].word[column];
    } else {
      const uint32_t even = row[2 * w].word[column / 2], odd = row[2 * w + 1].word[column / 2];
      out.word[w] = column % 2 ? (even >> 16) | (odd & 0xffff0000u) : (even & 0xffffu) | (odd << 16);
    }
  }
  return out;
}

// V tokens of one column, zeros past the last token.
template <class T>
__device__ __forceinline__ Quad load_column(const T* x, int64_t row_stride, int64_t rows) {
  Quad out{};
  NEUROADA_UNROLL
  for (int v = 0; v < kTokens<T>; ++v) {
    if (v >= rows) continue;
    if constexpr (sizeof(T) == 4) {
      out.word[v] = bits_of_float(x[v * row_stride]);
    } else {
      out.word[v / 2] |= uint32_t{x[v * row_stride].bits} << (v % 2 * 16);
    }
  }
  return out;
}

// One group: tile[place(c)] = x[t .. t + V, first + c], by the whole CTA. Loads run along the columns.
template <class T>
__device__ void stage_group(Quad* tile, const Tiles& tiles, const T* x, int64_t row_stride, int64_t rows,
                            int32_t first) {
  constexpr int V = kTokens<T>;
  const int32_t width = tiles.columns - first < tiles.width ? tiles.columns - first : tiles.width;
  const int32_t chunks = tiles.vectors ? width / V : 0;
  for (int32_t chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) {
    Quad row[V];
    NEUROADA_UNROLL
    for (int v = 0; v < V; ++v) row[v] = v < rows ? load16(x + v * row_stride + first + chunk * V) : Quad{};
    NEUROADA_UNROLL
    for (int q = 0; q < V; ++q) tile[place(chunk * V + q)] = transposed<T>(row, q);
  }
  for (int32_t c = chunks * V + threadIdx.x; c < width; c += blockDim.x) {
    tile[place(c)] = load_column(x + first + c, row_stride, rows);
  }
  if (threadIdx.x == 0) tile[tiles.zero] = Quad{};
}

// Stages the columns from `first` on of the `kGroups` groups of tokens from t on; barriers on both sides.
template <class T, int kGroups>
__device__ void stage(Quad* tile, const Tiles& tiles, const T* x, int64_t row_stride, int64_t tokens, int64_t t,
                      int32_t first) {
  __syncthreads();
  for (int g = 0; g < kGroups; ++g) {
    const int64_t start = t + g * kTokens<T>;
    stage_group(tile + g * tiles.stride, tiles, x + start * row_stride, row_stride, tokens - start, first);
  }
  __syncthreads();
}

// sum[g][v] += weight * (the staged column at `at`)[g][v]
template <class T, int kGroups>
__device__ __forceinline__ void add_column(float (&sum)[kGroups * kTokens<T>], float weight, const Quad* tile,
                                           const Tiles& tiles, int at) {
  NEUROADA_UNROLL
  for (int g = 0; g < kGroups; ++g) {
    const Quad quad = tile[g * tiles.stride + at];
    NEUROADA_UNROLL
    for (int v = 0; v < kTokens<T>; ++v) sum[g * kTokens<T> + v] += weight * element<T>(quad, v);
  }
}

// Four neighbouring slots of a neuron; those past its last have column -1.
constexpr int kSlots = 4;

template <class Word>
__device__ __forceinline__ void load_slots(const Word* from, int64_t count, bool vectors, Word absent,
                                           Word (&slots)[kSlots]) {
  static_assert(sizeof(Word) == 4);
  if (vectors) {
    const Quad quad = load16(from);
    std::memcpy(slots, quad.word, sizeof(quad));
    return;
  }
  NEUROADA_UNROLL
  for (int q = 0; q < kSlots; ++q) slots[q] = q < count ? from[q] : absent;
}

}  // namespace neuroada::cuda
