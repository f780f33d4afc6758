// The plan's connections as dx's kernel reads them. Within windows those columns with the most connections come first,
// so that the lanes of a warp, which has 32 columns at a time, are done at about the same time; of these the i-th
// connections lie side by side, 16 bytes of each column at a time, so that the lanes load theirs together. A window has
// 64 columns where lanes write what they sum, which had better be neighbours; else as many as are written together.
//
// A connection is a neuron and its delta, or packed into 4 bytes: the neuron's place in the lowest bits of the delta,
// which is rounded to the others. bfloat16 has 7 bits of mantissa, the packed delta at least 10.
//
// A column of more than `light` connections is heavy: it has its own in a row, for a warp to read together. Heavy
// columns are shared out evenly over the window's 32s. Where the neurons come in tiles, each tile has such columns of
// its own, in the same order, which in larger windows is by the connections in the first tile and in the others.
#pragma once

#include "kernels.h"
#include "staging.cuh"

namespace neuroada::cuda {

constexpr int kWindow = 2 * kWarp;  // of columns, or a multiple of it

// The column at a position of the order, d_in where there is none, and how many connections it has.
struct alignas(8) OrderedColumn {
  int32_t column, count;
};
static_assert(sizeof(OrderedColumn) == sizeof(WeightedNeuron));

// A connection is 8 bytes, or packed 4.
__host__ __device__ inline int32_t connections_a_quad(uint32_t place_mask) { return place_mask == 0 ? 2 : 4; }

// Where what lies in the scratch, of each tile: columns in order, and connections of the light ones. Behind all of
// them connections of the heavy ones, as in the plan.
struct ColumnEntries {
  WeightedNeuron* scratch;
  int64_t positions;    // of columns, a multiple of kWindow
  int32_t light;        // a multiple of four
  int32_t tiles;        // of the neurons
  uint32_t place_mask;  // where connections of light columns are packed, the bits of a place; or 0
  int32_t window;       // of columns that are in order, a multiple of kWindow; the last may have fewer

  __host__ __device__ int64_t tile_size() const { return positions * (1 + light); }
  __host__ __device__ int64_t size(int64_t live) const { return tiles * tile_size() + live; }

  __device__ __forceinline__ WeightedNeuron* of_tile(int32_t tile) const {
    return in_row(scratch, static_cast<uint32_t>(tile * tile_size()));
  }
  __device__ __forceinline__ OrderedColumn* column(int32_t tile, uint32_t position) const {
    return in_row(reinterpret_cast<OrderedColumn*>(of_tile(tile)), position);
  }
  // The first 16 bytes of a light column's connections; the next are kWarp further on. A heavy column has there
  // which of the heavy connections are its own.
  __device__ __forceinline__ Quad* quads(int32_t tile, uint32_t position) const {
    return place_mask == 0 ? quads<false>(tile, position / kWarp, position % kWarp)
                           : quads<true>(tile, position / kWarp, position % kWarp);
  }
  // The same of the lane's position among 32.
  template <bool kPacked>
  __device__ __forceinline__ Quad* quads(int32_t tile, uint32_t round, uint32_t lane) const {
    return in_row(reinterpret_cast<Quad*>(of_tile(tile)), first_quad<kPacked>(round, lane));
  }
  template <bool kPacked>
  __device__ __forceinline__ uint32_t first_quad(uint32_t round, uint32_t lane) const {
    constexpr uint32_t kEach = kPacked ? 4 : 2;  // connections_a_quad
    return static_cast<uint32_t>(positions) / 2 + lane + round * (kWarp * (static_cast<uint32_t>(light) / kEach));
  }
  __device__ __forceinline__ WeightedNeuron* heavy(uint32_t i) const { return of_tile(tiles) + i; }
};

// A delta rounded to the bits that `mask` leaves, to nearest and to even, and the place in the others.
__device__ __forceinline__ uint32_t pack(uint32_t place, float delta, uint32_t mask) {
  uint32_t bits = bits_of_float(delta);
  if (delta != delta) bits = 0x7fc00000;  // rounding up would carry into the sign
  const uint32_t odd = (bits & (mask + 1)) != 0;
  return ((bits + (mask >> 1) + odd) & ~mask) | place;
}

// The n-th of the connections that 16 bytes hold.
template <bool kPacked>
__device__ __forceinline__ WeightedNeuron connection(const Quad& quad, int n, uint32_t mask) {
  if constexpr (kPacked) {
    return {static_cast<int32_t>(quad.word[n] & mask), float_of_bits(quad.word[n] & ~mask)};
  } else {
    return {static_cast<int32_t>(quad.word[2 * n]), float_of_bits(quad.word[2 * n + 1])};
  }
}

}  // namespace neuroada::cuda
