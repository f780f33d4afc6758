// The mainloop of the GEMMs for sm_90a: a producer warpgroup copies tiles of both operands into a circular buffer of
// stages (TMA), the consumer warpgroups multiply them (wgmma). CTAs are persistent, each for many output tiles.
#pragma once

#include "hopper.cuh"

namespace neuroada::cuda {

// An output tile: 64 rows for each of `Consumers` warpgroups, `Columns` columns, and a circular buffer of `Stages`
// pieces. A piece is 64 elements of K, which fill a swizzled row.
template <int Consumers, int Columns, int Stages>
struct ProductTile {
  static constexpr int kConsumers = Consumers, kColumns = Columns, kStages = Stages;
  static constexpr int kRowsEach = 64;
  static constexpr int kRows = kRowsEach * Consumers;
  static constexpr int kDepth = kSwizzle / 2;
  static constexpr int kThreads = kWarpgroup * (1 + Consumers);
  static constexpr int kAccumulators = Columns / 2;  // per thread
  static_assert(Columns % 32 == 0 && Columns <= 256);
};

// Whether a CTA that starts with the most registers per thread can reallocate them to `copying` in the producer and
// `multiplying` in each consumer: a warpgroup that claims more than are free waits forever.
template <class Tile>
__host__ __device__ constexpr bool registers_suffice(int copying, int multiplying) {
  constexpr int kAtStart = 65536 / Tile::kThreads / 8 * 8;
  return copying + Tile::kConsumers * multiplying <= kAtStart * (1 + Tile::kConsumers);
}

template <class T, class Tile>
struct alignas(kSwizzleAtom) ProductShared {
  T left[Tile::kStages][Tile::kRows * Tile::kDepth];      // [rows, depth]
  T right[Tile::kStages][Tile::kColumns * Tile::kDepth];  // [columns, depth] or blocks of [depth, 64]
  Barrier full[Tile::kStages], empty[Tile::kStages];
  Barrier patched[Tile::kStages];  // the right operand, see patch_sm90.cuh

  static constexpr uint32_t kStageBytes = sizeof(left[0]) + sizeof(right[0]);
};

// Warps of the producer warpgroup that issue no copies.
constexpr int kSpareWarps = kWarpgroup / kWarp - 1;

// The sizes of the GEMM, and the number of output tiles along each side.
struct Grid {
  int32_t rows, columns, depth;
  int32_t row_tiles, column_tiles;
};

// A position in the circular buffer; the parity is that of the current phase of its barriers.
struct Stage {
  int index = 0;
  uint32_t parity = 0;

  template <int kStages>
  __device__ __forceinline__ void advance() {
    if (++index == kStages) {
      index = 0;
      parity ^= 1;
    }
  }
};

struct TilePlace {
  int32_t row, column;  // of the first element
};

// Tiles go down columns of kDown tiles, so that concurrent CTAs share rows of both operands in L2.
template <class Tile>
__device__ __forceinline__ TilePlace place_of(const Grid& grid, int64_t tile) {
  constexpr int32_t kDown = 8;
  const int64_t band = tile / (int64_t{kDown} * grid.column_tiles);
  const int32_t within = static_cast<int32_t>(tile - band * kDown * grid.column_tiles);
  const int32_t first = static_cast<int32_t>(band) * kDown;
  const int32_t down = grid.row_tiles - first < kDown ? grid.row_tiles - first : kDown;
  return {(first + within % down) * Tile::kRows, within / down * Tile::kColumns};
}

__device__ __forceinline__ int64_t tiles_of(const Grid& grid) { return int64_t{grid.row_tiles} * grid.column_tiles; }

template <class Tile>
__device__ __forceinline__ int32_t pieces_of(const Grid& grid) {
  return (grid.depth + Tile::kDepth - 1) / Tile::kDepth;
}

// On `empty`, one lane per consumer warp arrives once the warp has read the stage; on `patched`, one lane per spare
// warp once its share is patched.
template <class T, class Tile>
__device__ __forceinline__ void prepare_barriers(ProductShared<T, Tile>& shared) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < Tile::kStages; ++i) {
      init_barrier(shared.full[i], 1);
      init_barrier(shared.empty[i], Tile::kConsumers * kWarpgroup / kWarp);
      init_barrier(shared.patched[i], kSpareWarps);
    }
    publish_barriers();
  }
  __syncthreads();
}

// For one thread: copies the consumers' operands, as far ahead as the buffer is long. With kRowsOfRight the right
// operand is [depth, columns] in memory, otherwise [columns, depth].
template <class T, class Tile, bool kRowsOfRight>
__device__ void copy_tiles(ProductShared<T, Tile>& shared, const TensorMap& left, const TensorMap& right,
                           const Grid& grid) {
  constexpr int kBlock = kSwizzle / 2;
  static_assert(!kRowsOfRight || Tile::kColumns % kBlock == 0, "a box of the right operand is kBlock columns");
  prefetch(left);
  prefetch(right);
  Stage stage;
  for (int64_t tile = blockIdx.x; tile < tiles_of(grid); tile += gridDim.x) {
    const TilePlace at = place_of<Tile>(grid, tile);
    for (int32_t piece = 0; piece < pieces_of<Tile>(grid); ++piece, stage.advance<Tile::kStages>()) {
      const int32_t depth = piece * Tile::kDepth;
      Barrier& full = shared.full[stage.index];
      T* to = shared.right[stage.index];
      wait(shared.empty[stage.index], stage.parity ^ 1);
      arrive_expecting(full, ProductShared<T, Tile>::kStageBytes);
      copy_box(shared.left[stage.index], left, depth, at.row, full);
      if constexpr (kRowsOfRight) {
        for (int c = 0; c < Tile::kColumns; c += kBlock) {
          copy_box(to + c * Tile::kDepth, right, at.column + c, depth, full);
        }
      } else {
        copy_box(to, right, depth, at.column, full);
      }
    }
  }
}

// Issues the wgmma of one stage, each over 16 elements of K.
template <class T, class Tile, bool kRowsOfRight>
__device__ __forceinline__ void multiply_stage(float (&sum)[Tile::kAccumulators], const T* left, const T* right,
                                               bool first) {
  constexpr uint32_t kLeftStep = 16 * 2, kRightStep = kRowsOfRight ? 16 * kSwizzle : 16 * 2;
  constexpr uint32_t kBlockBytes = Tile::kDepth * kSwizzle;  // of 64 columns
  const uint64_t a = matrix_descriptor(shared_address(left), 0, kSwizzleAtom);
  const uint64_t b = matrix_descriptor(shared_address(right), kRowsOfRight ? kBlockBytes : 0, kSwizzleAtom);
  NEUROADA_UNROLL
  for (int step = 0; step < Tile::kDepth / 16; ++step) {
    // Descriptor addresses are in units of 16 bytes.
    wgmma<T, Tile::kColumns, kRowsOfRight>(sum, a + step * (kLeftStep / 16), b + step * (kRightStep / 16),
                                           !first || step > 0);
  }
}

// For one consumer: sum = its 64 rows of one tile, from stages that are full and patched. The wgmma of a stage stay in
// flight while those of the next are issued, so a stage is released one iteration later.
template <class T, class Tile, bool kRowsOfRight>
__device__ __forceinline__ void multiply_tile(float (&sum)[Tile::kAccumulators], ProductShared<T, Tile>& shared,
                                              int consumer, int32_t pieces, Stage& stage) {
  const bool speaks = threadIdx.x % kWarp == 0;
  int before = 0;
  keep_in_registers(sum);
  for (int32_t piece = 0; piece < pieces; ++piece, stage.advance<Tile::kStages>()) {
    wait(shared.full[stage.index], stage.parity);
    wait(shared.patched[stage.index], stage.parity);
    wgmma_fence();
    multiply_stage<T, Tile, kRowsOfRight>(sum, shared.left[stage.index] + consumer * Tile::kRowsEach * Tile::kDepth,
                                          shared.right[stage.index], piece == 0);
    wgmma_commit();
    wgmma_wait<1>();
    if (piece > 0) {
      sync_warp();
      if (speaks) arrive(shared.empty[before]);
    }
    before = stage.index;
  }
  wgmma_wait<0>();
  keep_in_registers(sum);
  sync_warp();
  if (speaks) arrive(shared.empty[before]);
}

}  // namespace neuroada::cuda
