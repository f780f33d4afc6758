// The plan's connections in the layout that the dx kernels read. Within windows, columns with the most connections come
// first, so that the lanes of a warp, one column each, finish at about the same time. The i-th connections of 32
// columns are adjacent, in units of 16 bytes per column, so that a warp's loads are coalesced. A window has 64 columns
// if lanes write their sums directly, where adjacent columns are faster; otherwise as many as are written together.
//
// A connection is a neuron and its delta, or packed into 4 bytes: the neuron's place in the lowest bits of the delta,
// which is rounded to the other bits. bfloat16 has 7 bits of mantissa, the packed delta at least 10.
//
// A column of more than `light` connections is heavy: its connections are contiguous, for a warp to read together.
// Heavy columns are distributed evenly over the window's rounds of 32 columns. If the neurons come in tiles, each tile
// has its own lists of all columns, in the same order, which in larger windows is by the connections in the first tile
// and in the others.
#pragma once

#include "kernels.h"
#include "staging.cuh"

namespace neuroada::cuda {

constexpr int kWindow = 2 * kWarp;  // columns; windows are multiples of it

// The column at a position of the order (d_in if none), and its number of connections.
struct alignas(8) OrderedColumn {
  int32_t column, count;
};
static_assert(sizeof(OrderedColumn) == sizeof(WeightedNeuron));

// A connection is 8 bytes, or 4 if packed.
__host__ __device__ inline int32_t connections_per_quad(uint32_t place_mask) { return place_mask == 0 ? 2 : 4; }

// Layout of the scratch: per tile, the columns in order and the connections of the light ones; after all tiles, the
// connections of the heavy ones, indexed as in the plan.
struct ColumnEntries {
  WeightedNeuron* scratch;
  int64_t positions;    // of columns, a multiple of kWindow
  int32_t light;        // most connections of a light column, a multiple of four
  int32_t tiles;        // of the neurons
  uint32_t place_mask;  // the bits of a place if light columns are packed, or 0
  int32_t window;       // of columns sorted together, a multiple of kWindow; the last may have fewer

  __host__ __device__ int64_t tile_size() const { return positions * (1 + light); }
  __host__ __device__ int64_t size(int64_t live) const { return tiles * tile_size() + live; }

  __device__ __forceinline__ WeightedNeuron* of_tile(int32_t tile) const {
    return in_row(scratch, static_cast<uint32_t>(tile * tile_size()));
  }
  __device__ __forceinline__ OrderedColumn* column(int32_t tile, uint32_t position) const {
    return in_row(reinterpret_cast<OrderedColumn*>(of_tile(tile)), position);
  }
  // The first 16 bytes of a light column's connections; the next are kWarp quads further on. For a heavy column, the
  // first word is the index of its first connection in heavy().
  __device__ __forceinline__ Quad* quads(int32_t tile, uint32_t position) const {
    return place_mask == 0 ? quads<false>(tile, position / kWarp, position % kWarp)
                           : quads<true>(tile, position / kWarp, position % kWarp);
  }
  // The same for a round of 32 columns and a lane.
  template <bool kPacked>
  __device__ __forceinline__ Quad* quads(int32_t tile, uint32_t round, uint32_t lane) const {
    return in_row(reinterpret_cast<Quad*>(of_tile(tile)), first_quad<kPacked>(round, lane));
  }
  template <bool kPacked>
  __device__ __forceinline__ uint32_t first_quad(uint32_t round, uint32_t lane) const {
    constexpr uint32_t kEach = kPacked ? 4 : 2;  // connections_per_quad
    return static_cast<uint32_t>(positions) / 2 + lane + round * (kWarp * (static_cast<uint32_t>(light) / kEach));
  }
  __device__ __forceinline__ WeightedNeuron* heavy(uint32_t i) const { return of_tile(tiles) + i; }
};

// A delta rounded to nearest even in the bits outside `mask`, and the place in the others.
__device__ __forceinline__ uint32_t pack(uint32_t place, float delta, uint32_t mask) {
  uint32_t bits = bits_of_float(delta);
  if (delta != delta) bits = 0x7fc00000;  // rounding up would carry into the sign
  const uint32_t odd = (bits & (mask + 1)) != 0;
  return ((bits + (mask >> 1) + odd) & ~mask) | place;
}

// The n-th connection in a quad.
template <bool kPacked>
__device__ __forceinline__ WeightedNeuron connection(const Quad& quad, int n, uint32_t mask) {
  if constexpr (kPacked) {
    return {static_cast<int32_t>(quad.word[n] & mask), float_of_bits(quad.word[n] & ~mask)};
  } else {
    return {static_cast<int32_t>(quad.word[2 * n]), float_of_bits(quad.word[2 * n + 1])};
  }
}

}  // namespace neuroada::cuda
