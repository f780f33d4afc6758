// Blocks of tokens in shared memory, as [column][V tokens] of 16 bytes: a gather of one column is one 16-byte read that
// serves V tokens. Shared by all staged kernels.
#pragma once

#include "device.cuh"

namespace neuroada::cuda {

// Threads per CTA at 128 registers per thread; or twice as many at 64.
constexpr int kMaxThreads = 512;

// V: the tokens of a block, 8 in sixteen bits and 4 in float32.
template <class T>
constexpr int kTokens = 16 / static_cast<int>(sizeof(T));

// Maximum number of stages of bulk-copied blocks.
constexpr int kMostStages = 2;

// Layout of a matrix's columns in shared memory: tiles of `width` columns and a column of zeros. If a tile has all
// columns and two of them fit, one block is read while the next is staged.
struct Tiles {
  int32_t columns;  // of the matrix
  int32_t width;    // of a tile: all columns, or a multiple of 8
  int32_t zero;     // the place of the column of zeros
  int32_t stride;   // from a tile to the next
  int32_t count;    // 1 or 2
  int32_t stages;   // of untransposed tiles after the one that is read, or 0: bulk_staging.cuh
  bool vectors;     // rows are read 8 bytes at a time: they are aligned

  // A block has 16 bytes per column for any dtype. With stages, each tile has 16 more for two barriers.
  __host__ __device__ int32_t quads() const { return count * stride + (stages == 0 ? 0 : count + stages * width); }
  __host__ __device__ int64_t bytes() const { return int64_t{quads()} * 16; }
  __host__ __device__ bool single() const { return width == columns; }
};

// The place of a column in its tile. A lane that transposes writes adjacent columns one by one; permuting columns
// within blocks of 8 spreads the lanes over all banks.
__device__ __forceinline__ int place(int column) { return column ^ (column >> 3 & 7); }

// The place of `column` in the tile that starts at `first`, or that of the zeros; `inside` tells which.
__device__ __forceinline__ int place_in_tile(const Tiles& tiles, int32_t column, int32_t first, bool& inside) {
  const uint32_t offset = static_cast<uint32_t>(column) - static_cast<uint32_t>(first);
  inside = column >= 0 && column < tiles.columns && offset < static_cast<uint32_t>(tiles.width);
  return inside ? place(static_cast<int>(offset)) : tiles.zero;
}

// Column q of V rows; row[v] has the words of row v that hold it.
template <class T, int kWords>
__device__ __forceinline__ Quad transposed(const uint32_t (&row)[kTokens<T>][kWords], int q) {
  Quad out;
  NEUROADA_UNROLL
  for (int w = 0; w < 4; ++w) {
    if constexpr (sizeof(T) == 4) {
      out.word[w] = row[w][q];
    } else {
      const uint32_t even = row[2 * w][q / 2], odd = row[2 * w + 1][q / 2];
      out.word[w] = bytes_of(even, odd, q % 2 ? 0x7632 : 0x5410);
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

// How many of the V tokens from t on there are.
template <class T>
__device__ __forceinline__ int rows_of_block(int64_t tokens, int64_t t) {
  return tokens - t < kTokens<T> ? static_cast<int>(tokens - t) : kTokens<T>;
}

// A lane's kBytes of each row of a block, in registers on their way to shared memory.
template <class T, int kBytes>
struct Rows {
  static constexpr int V = kTokens<T>, kColumns = kBytes / static_cast<int>(sizeof(T));
  uint32_t row[V][kBytes / 4];

  // Loads from column `column` on, of rows that all threads share; zeros past the last of `count` rows.
  __device__ __forceinline__ void load(const T* rows, int64_t row_stride, int32_t count, int32_t column) {
    if (count >= V) {
      NEUROADA_UNROLL
      for (int v = 0; v < V; ++v) load_words(in_row(rows + v * row_stride, column), row[v]);
      return;
    }
    NEUROADA_UNROLL
    for (int v = 0; v < V; ++v) {
      NEUROADA_UNROLL
      for (int w = 0; w < kBytes / 4; ++w) row[v][w] = 0;
      if (v < count) load_words(in_row(rows + v * row_stride, column), row[v]);
    }
  }
  __device__ __forceinline__ void store(Quad* tile, int32_t column) const {
    const int32_t first = place(opaque(column));  // column + q is at first ^ q, for q < kColumns
    NEUROADA_UNROLL
    for (int q = 0; q < kColumns; ++q) tile[first ^ q] = transposed<T>(row, q);
  }
};

// tile[place(c)] = x[t .. t + V, first + c] for c from `from` on, by the whole CTA. Loads are coalesced along the rows;
// kAtOnce times 8 bytes of each row are in flight at once, registers permitting.
template <int kAtOnce, class T>
__device__ __forceinline__ void stage_columns(Quad* tile, const Tiles& tiles, const T* x, int64_t row_stride,
                                              int32_t rows, int32_t first, int32_t from = 0) {
  constexpr int32_t kColumns = Rows<T, 8>::kColumns;
  const int32_t width = tiles.columns - first < tiles.width ? tiles.columns - first : tiles.width;
  const int32_t whole = tiles.vectors && from % kColumns == 0 ? width / kColumns * kColumns : from;
  const int32_t step = blockDim.x * kColumns;
  for (int32_t c = from + static_cast<int32_t>(threadIdx.x) * kColumns; c < whole; c += kAtOnce * step) {
    Rows<T, 8> chunk[kAtOnce];
    NEUROADA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (c + i * step < whole) chunk[i].load(x + first, row_stride, rows, c + i * step);
    }
    NEUROADA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (c + i * step < whole) chunk[i].store(tile, c + i * step);
    }
  }
  for (int32_t c = whole + threadIdx.x; c < width; c += blockDim.x) {
    tile[place(c)] = load_column(x + first + c, row_stride, rows);
  }
}

// Prefetches to L2 a block that is staged soon, so that its loads have at most L2 latency: all CTAs load theirs at the
// same time, and memory would be idle in between.
template <class T>
__device__ __forceinline__ void fetch_block(const T* x, int64_t row_stride, int64_t rows, int32_t columns) {
  constexpr int32_t kLine = 128 / static_cast<int32_t>(sizeof(T));
  const int32_t lines = (columns + kLine - 1) / kLine;
  for (int32_t i = threadIdx.x; i < lines * kTokens<T>; i += blockDim.x) {
    const int32_t row = i / lines;
    if (row < rows) prefetch_l2(x + row * row_stride + i % lines * kLine);
  }
}

// The columns of the next block that a CTA loads while it reads the current one, at most all: in kParts parts of 4
// bytes per row and lane, or in two of 8.
template <class T, int kParts>
struct Ahead {
  using Chunk = Rows<T, kParts == 2 ? 8 : 4>;
  Chunk chunk;

  // Columns from here on are not loaded ahead.
  __device__ __forceinline__ static int32_t end(const Tiles& tiles) {
    const int32_t most = kParts * blockDim.x * Chunk::kColumns,
                  whole = tiles.columns / Chunk::kColumns * Chunk::kColumns;
    return !tiles.vectors ? 0 : most < whole ? most : whole;
  }
  __device__ __forceinline__ static int32_t column(int part) {
    return static_cast<int32_t>(part * blockDim.x + threadIdx.x) * Chunk::kColumns;
  }
  __device__ __forceinline__ void load(const Tiles& tiles, const T* x, int64_t row_stride, int32_t rows, int part) {
    if (column(part) < end(tiles)) chunk.load(x, row_stride, rows, column(part));
  }
  __device__ __forceinline__ void store(const Tiles& tiles, Quad* tile, int part) const {
    if (column(part) < end(tiles)) chunk.store(tile, column(part));
  }
};

// A part of the work on a block, as a type.
template <int N>
struct Part {
  static constexpr int value = N;
};

// read(Part<N>) for N from kPart on.
template <int kPart, int kParts, class Read>
__device__ __forceinline__ void read_in_turn(Read&& read) {
  read(Part<kPart>{});
  if constexpr (kPart + 1 < kParts) read_in_turn<kPart + 1, kParts>(read);
}

// The same; each part loads columns of the next block before it reads, and stores them after.
template <int kPart, int kParts, class T, class Read>
__device__ __forceinline__ void read_parts(const Tiles& tiles, Quad* other, const T* next, int64_t row_stride,
                                           int32_t rows, bool more, Read&& read) {
  Ahead<T, kParts> ahead;
  if (more) ahead.load(tiles, next, row_stride, rows, kPart);
  read(Part<kPart>{});
  if (more) ahead.store(tiles, other, kPart);
  if constexpr (kPart + 1 < kParts) read_parts<kPart + 1, kParts>(tiles, other, next, row_stride, rows, more, read);
}

// The blocks [begin, end) of x, V tokens each, staged one after another by the whole CTA. For each block and each tile
// of its columns `read(block, tile, first, Part<N>)` does kParts parts of the work, while the next block is loaded.
template <int kParts, int kAtOnce, class T, class Read>
__device__ __forceinline__ void for_each_block(const Tiles& tiles, const T* x, int64_t row_stride, int64_t tokens,
                                               int32_t begin, int32_t end, Read&& read) {
  constexpr int V = kTokens<T>;
  Quad* tile = shared_quads();
  Quad* other = tile + (tiles.count - 1) * tiles.stride;
  const T* rows = x + int64_t{begin} * V * row_stride;
  for (int32_t block = begin; block < end; ++block, rows += V * row_stride) {
    const int32_t left =
        static_cast<int32_t>(tokens - int64_t{block} * V < 2 * V ? tokens - int64_t{block} * V : 2 * V);
    int32_t first = 0;
    do {  // runs once if there are no columns
      if (tiles.count == 1 || block == begin) {
        __syncthreads();
        if (threadIdx.x == 0) tile[tiles.zero] = other[tiles.zero] = Quad{};
        stage_columns<kAtOnce>(tile, tiles, rows, row_stride, left, first);
        __syncthreads();
      }
      if (first == 0 && block + tiles.count < end) {  // the next block, or the one after that
        const int64_t soon = int64_t{tiles.count} * V;
        fetch_block(rows + soon * row_stride, row_stride, tokens - int64_t{block} * V - soon, tiles.columns);
      }
      const bool more = tiles.count == 2 && block + 1 < end;
      const T* next = rows + V * row_stride;
      read_parts<0, kParts>(tiles, other, next, row_stride, left - V, more,
                            [&](auto part) { read(block, static_cast<const Quad*>(tile), first, part); });
      if (more) {
        stage_columns<1>(other, tiles, next, row_stride, left - V, 0, Ahead<T, kParts>::end(tiles));
        __syncthreads();
        Quad* const read_now = tile;
        tile = other;
        other = read_now;
      }
      first += tiles.width;
    } while (first < tiles.columns);
  }
}

// Eight sums rounded to 16 bits, packed as in memory.
template <class T>
__device__ __forceinline__ Quad rounded_quad(const float (&sum)[kTokens<T>]) {
  static_assert(sizeof(T) == 2);
  Quad quad;
  NEUROADA_UNROLL
  for (int w = 0; w < 4; ++w) {
    uint32_t word[1];
    round_pair<T>(sum[2 * w], sum[2 * w + 1], word);
    quad.word[w] = word[0];
  }
  return quad;
}

// sum[v] += weight * (the staged column)[v]
template <class T>
__device__ __forceinline__ void add_column(float (&sum)[kTokens<T>], float weight, const Quad& column) {
  NEUROADA_UNROLL
  for (int v = 0; v < kTokens<T>; ++v) sum[v] += weight * element<T>(column, v);
}

}  // namespace neuroada::cuda
