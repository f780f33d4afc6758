// Epilogue of the GEMMs for sm_90a: adds the bias to a finished tile in float32, rounds the sum once and writes it
// once.
#pragma once

#include "product_sm90.cuh"

namespace neuroada::cuda {

struct Epilogue {
  const void* bias;  // [columns], or null for zero
  void* out;         // [rows, columns]
  int64_t out_stride;
  bool vectors;  // rows of out are written 16 bytes at a time
};

template <class T>
__device__ __forceinline__ float bias_of(const Epilogue& epilogue, int64_t column, int64_t columns) {
  return epilogue.bias && column < columns ? to_float(static_cast<const T*>(epilogue.bias)[column]) : 0.0f;
}

// Transposes 4 x 4 words over the four lanes of a row. Before, word[i] of lane q holds columns 2 q and 2 q + 1 of the
// i-th of four groups of 8; after, it holds the i-th word of group q.
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

// out = product + bias for the 64 rows of one consumer, whose accumulators are `sum`. A lane holds two adjacent columns
// of each group of 8, in rows r and r + 8.
template <class T, class Tile>
__device__ __forceinline__ void finish_tile(const float (&sum)[Tile::kAccumulators], const Epilogue& epilogue,
                                            const Grid& grid, TilePlace at, int consumer) {
  const int lane = threadIdx.x % kWarp, quarter = lane % 4;
  const int64_t row = at.row + consumer * Tile::kRowsEach + threadIdx.x % kWarpgroup / kWarp * 16 + lane / 4;
  NEUROADA_UNROLL
  for (int block = 0; block < Tile::kColumns / 32; ++block) {
    const int64_t first = at.column + block * 32;
    uint32_t word[2][4];
    NEUROADA_UNROLL
    for (int group = 0; group < 4; ++group) {
      const int64_t column = first + group * 8 + quarter * 2;
      const float bias[2] = {bias_of<T>(epilogue, column, grid.columns),
                             bias_of<T>(epilogue, column + 1, grid.columns)};
      const float* product = sum + (block * 4 + group) * 4;
      NEUROADA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const T low = round_to<T>(product[2 * half] + bias[0]), high = round_to<T>(product[2 * half + 1] + bias[1]);
        word[half][group] = uint32_t{low.bits} | uint32_t{high.bits} << 16;
      }
    }
    NEUROADA_UNROLL
    for (int half = 0; half < 2; ++half) {
      transpose_words(word[half]);
      const int64_t t = row + 8 * half;
      if (t < grid.rows) write_eight<T>(epilogue, word[half], t, first + quarter * 8, grid.columns);
    }
  }
}

}  // namespace neuroada::cuda
