// What the fused kernels for sm_90a do with a finished product: bypass and bias are added in float32,
// the sum is rounded once and written once.
//
// The bypass is gathered from the transposed tokens [rows, tokens], which the second cache holds: 128
// contiguous bytes are one row's 64 tokens. So a lane sums 8 tokens of a column, which the accumulators'
// layout has in 8 other lanes; the sums change places through shared memory, 64 columns at a time.
#pragma once

#include "kernels.h"
#include "product_sm90.cuh"

namespace neuroada::cuda {

constexpr int kGroupTokens = 8;       // of 16 bits in 16 bytes
constexpr int kManyConnections = 32;  // above it, the four parts of a warp share a column's connections

// A connection of an output column: a row of the transposed tokens, and its weight; -1 for none.
struct Connection {
  int32_t row;
  float weight;
};

struct Span {
  int32_t begin, end;

  __device__ __forceinline__ bool many() const { return end - begin > kManyConnections; }
};

struct Epilogue {
  const void* transposed;     // [.., transposed_stride], 16-byte rows, from the launch's first token on; or null
  int64_t transposed_stride;  // a multiple of 8
  const void* bias;           // [columns], or null for zero
  void* out;                  // [first_row + rows, columns]
  int64_t out_stride;
  bool vectors;  // rows of out are written 16 bytes at a time
};

// sum += the connections begin, begin + step and so on, of 8 tokens.
template <class T, class Connections>
__device__ __forceinline__ void add_connections(float (&sum)[kGroupTokens], const Connections& connections, Span span,
                                                int step, const T* tokens, int64_t stride) {
  for (int32_t i = span.begin; i < span.end; i += step) {
    const Connection connection = connections.at(i);
    if (connection.row < 0) continue;
    const Quad quad = load16(tokens + connection.row * stride);
    NEUROADA_UNROLL
    for (int v = 0; v < kGroupTokens; ++v) sum[v] += connection.weight * element<T>(quad, v);
  }
}

// The same of a column with many, that of the lanes of part `owner`: the parts of the warp take every
// fourth connection each, and their sums are added as (0 + 1) + (2 + 3).
template <class T, class Connections>
__device__ __forceinline__ void add_many(float (&sum)[kGroupTokens], const Connections& connections, Span own,
                                         int owner, bool inside, const T* tokens, int64_t stride) {
  constexpr int kParts = kWarp / kGroupTokens;
  const int part = threadIdx.x % kWarp / kGroupTokens;
  Span span{__shfl_sync(kAllLanes, own.begin, owner * kGroupTokens),
            __shfl_sync(kAllLanes, own.end, owner * kGroupTokens)};
  if (!span.many()) return;
  span.begin += part;
  float total[kGroupTokens] = {};
  if (inside) add_connections(total, connections, span, kParts, tokens, stride);
  NEUROADA_UNROLL
  for (int v = 0; v < kGroupTokens; ++v) {
    total[v] += __shfl_xor_sync(kAllLanes, total[v], kGroupTokens);
    total[v] += __shfl_xor_sync(kAllLanes, total[v], 2 * kGroupTokens);
    sum[v] += part == owner ? total[v] : 0.0f;
  }
}

// staged[column][row] = bypass and bias of a strip of columns, by one warpgroup. A lane has 8 tokens of
// one column in sixteen; tokens past the last one are left out.
template <class T, class Tile, class Connections>
__device__ __forceinline__ void stage_bypass(float* staged, const Connections& connections, const Epilogue& epilogue,
                                             int64_t first_column, int64_t columns, int64_t first_token,
                                             int64_t tokens) {
  constexpr int kSixteens = Tile::kStrip / 16;
  const int lane = threadIdx.x % kWarp, group = lane % kGroupTokens;
  const int own = threadIdx.x % kWarpgroup / kGroupTokens;
  const int64_t t = first_token + group * kGroupTokens;
  const bool inside = t < tokens;
  const T* from = epilogue.transposed ? static_cast<const T*>(epilogue.transposed) + t : nullptr;
  const int64_t stride = epilogue.transposed_stride;
  NEUROADA_ROLLED
  for (int i = 0; i < kSixteens; ++i) {
    const int column = i * 16 + own;
    const int64_t j = first_column + column;
    const Span span = j < columns ? connections.of(j) : Span{0, 0};
    float sum[kGroupTokens] = {};
    if (inside && !span.many()) add_connections(sum, connections, span, 1, from, stride);
    if (__ballot_sync(kAllLanes, span.many()) != 0) {
      NEUROADA_ROLLED
      for (int owner = 0; owner < kWarp / kGroupTokens; ++owner) {
        add_many(sum, connections, span, owner, inside, from, stride);
      }
    }
    const float bias = epilogue.bias && j < columns ? to_float(static_cast<const T*>(epilogue.bias)[j]) : 0.0f;
    Quad halves[2];
    NEUROADA_UNROLL
    for (int v = 0; v < kGroupTokens; ++v) halves[v / 4].word[v % 4] = bits_of_float(sum[v] + bias);
    store16(staged + column * Tile::kStripStride + group * kGroupTokens, halves[0]);
    store16(staged + column * Tile::kStripStride + group * kGroupTokens + 4, halves[1]);
  }
}

// word[i] of lane q, which is that of columns 2 q and 2 q + 1 in the i-th of four groups of 8, becomes
// the i-th of the four words of group q: the four lanes of a row change places.
__device__ __forceinline__ void transpose_words(uint32_t (&word)[4]) {
  const int lane = threadIdx.x % kWarp;
  NEUROADA_UNROLL
  for (int step = 1; step <= 2; step *= 2) {
    const bool upper = lane & step;
    NEUROADA_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      const uint32_t sent = upper ? word[i] : word[i + step];
      const uint32_t received = __shfl_xor_sync(kAllLanes, sent, step);
      if (upper) {
        word[i] = received;
      } else {
        word[i + step] = received;
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void write_eight(const Epilogue& epilogue, const uint32_t (&word)[4], int64_t row,
                                            int64_t column, int64_t columns) {
  T* out = static_cast<T*>(epilogue.out) + row * epilogue.out_stride + column;
  if (epilogue.vectors && column + 8 <= columns) {
    store16(out, {{word[0], word[1], word[2], word[3]}});
    return;
  }
  NEUROADA_UNROLL
  for (int q = 0; q < 8; ++q) {
    if (column + q < columns) out[q] = T{static_cast<uint16_t>(word[q / 2] >> (q % 2 * 16))};
  }
}

// out = product + staged, of one strip: `sum` are the accumulators of its columns.
template <class T, class Tile>
__device__ __forceinline__ void write_strip(const float* sum, const float* staged, const Epilogue& epilogue,
                                            int64_t first_column, int64_t columns, int64_t first_row, int64_t rows,
                                            int64_t row_offset) {
  const int lane = threadIdx.x % kWarp, quarter = lane % 4;
  const int row = threadIdx.x % kWarpgroup / kWarp * 16 + lane / 4;
  NEUROADA_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t t = first_row + row + 8 * half;
    NEUROADA_UNROLL
    for (int block = 0; block < Tile::kStrip / 32; ++block) {
      uint32_t word[4];
      NEUROADA_UNROLL
      for (int group = 0; group < 4; ++group) {
        const int column = block * 32 + group * 8 + quarter * 2;
        const float* bypass = staged + column * Tile::kStripStride + row + 8 * half;
        const float* product = sum + (block * 4 + group) * 4 + 2 * half;
        const T low = round_to<T>(product[0] + bypass[0]), high = round_to<T>(product[1] + bypass[Tile::kStripStride]);
        word[group] = uint32_t{low.bits} | uint32_t{high.bits} << 16;
      }
      transpose_words(word);
      const int64_t column = first_column + block * 32 + quarter * 8;
      if (t < rows) write_eight<T>(epilogue, word, row_offset + t, column, columns);
    }
  }
}

// The 64 rows of one consumer.
template <class T, class Tile, class Connections>
__device__ __forceinline__ void finish_tile(const float (&sum)[Tile::kAccumulators], float* staged,
                                            const Connections& connections, const Epilogue& epilogue, const Grid& grid,
                                            TilePlace at, int consumer) {
  const int64_t first_row = at.row + consumer * Tile::kRowsEach;
  NEUROADA_UNROLL
  for (int strip = 0; strip < Tile::kColumns / Tile::kStrip; ++strip) {
    const int64_t first_column = at.column + strip * Tile::kStrip;
    sync_threads<kWarpgroup>(1 + consumer);  // what was staged before has been read
    stage_bypass<T, Tile>(staged, connections, epilogue, first_column, grid.columns, first_row, grid.rows);
    sync_threads<kWarpgroup>(1 + consumer);
    write_strip<T, Tile>(sum + strip * (Tile::kStrip / 2), staged, epilogue, first_column, grid.columns, first_row,
                         grid.rows, grid.first_row);
  }
}

}  // namespace neuroada::cuda
