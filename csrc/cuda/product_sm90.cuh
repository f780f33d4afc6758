// The product of the kernels for sm_90a: one warpgroup copies tiles of both operands into a ring
// of stages (TMA), the others multiply them (wgmma), a CTA stays for many tiles of the output.
#pragma once

#include "hopper.cuh"

namespace neuroada::cuda {

// A tile of the output: 64 rows for each of `Consumers` warpgroups, `Columns` columns, and a ring of
// `Stages` pieces of the sum over 64 of its terms, which fill a swizzled row.
template <int Consumers, int Columns, int Stages>
struct ProductTile {
  static constexpr int kConsumers = Consumers, kColumns = Columns, kStages = Stages;
  static constexpr int kRowsEach = 64;
  static constexpr int kRows = kRowsEach * Consumers;
  static constexpr int kDepth = kSwizzle / 2;
  static constexpr int kThreads = kWarpgroup * (1 + Consumers);
  static constexpr int kAccumulators = Columns / 2;  // of a thread
  static_assert(Columns % 32 == 0 && Columns <= 256);
};

// Whether a CTA that starts with as many registers a thread as it can may come to have `copying` in one
// warpgroup and `multiplying` in the others: a warpgroup that claims more than there are waits for ever.
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

// Those of the copying warpgroup that copy nothing.
constexpr int kSpareWarps = kWarpgroup / kWarp - 1;

// The sizes of the product, and the tiles of its output.
struct Grid {
  int32_t rows, columns, depth;
  int32_t row_tiles, column_tiles;
};

// A place in the ring; the parity is that of the phase in which its barriers are.
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

// Neighbouring CTAs share rows of both operands in L2: tiles go down columns of kDown.
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

// One lane of each consumer's warps says that a stage may be written again, once the warp has read it, and one of
// each spare warp that its share is patched.
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

// One thread: what the consumers will multiply, as far ahead as the ring is long. With kRowsOfRight the
// right operand is [depth, columns] in memory, otherwise [columns, depth].
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

// Starts the products of one stage, 16 terms each.
template <class T, class Tile, bool kRowsOfRight>
__device__ __forceinline__ void multiply_stage(float (&sum)[Tile::kAccumulators], const T* left, const T* right,
                                               bool first) {
  constexpr uint32_t kLeftStep = 16 * 2, kRightStep = kRowsOfRight ? 16 * kSwizzle : 16 * 2;
  constexpr uint32_t kBlockBytes = Tile::kDepth * kSwizzle;  // of 64 columns
  const uint64_t a = matrix_descriptor(shared_address(left), 0, kSwizzleAtom);
  const uint64_t b = matrix_descriptor(shared_address(right), kRowsOfRight ? kBlockBytes : 0, kSwizzleAtom);
  NEUROADA_UNROLL
  for (int step = 0; step < Tile::kDepth / 16; ++step) {
    // In a descriptor, addresses count 16 bytes.
    wgmma<T, Tile::kColumns, kRowsOfRight>(sum, a + step * (kLeftStep / 16), b + step * (kRightStep / 16),
                                           !first || step > 0);
  }
}

// One consumer: sum = its 64 rows of one tile, from stages that are full and patched.
// The products of a stage run while those of the next are started, so a stage is given back one later.
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
