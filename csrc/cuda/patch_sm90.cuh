// W[j, index[j, s]] = round(W + delta[j, s]) in a tile of W in shared memory, before the tensor cores read it
//
// Run by the spare warps of the producer warpgroup, which issue no copies. Their threads are divided evenly among the
// tile's groups of neurons; each takes every kThreadsEach-th connection of its group. Loads are pipelined three pieces
// deep: offsets, then connections, then deltas.
#pragma once

#include "kernels.h"
#include "product_sm90.cuh"

namespace neuroada::cuda {

struct Patches {
  const int32_t* start;     // see BlockEntries
  const BlockEntry* entry;  // [d_out, k]
  const float* delta;       // [d_out, k]
  int32_t d_out, k, blocks;
};

// Layout of a piece of W in a stage, in swizzled rows: [neurons, 64 inputs] or, with kRowsOfRight, [64 neurons, inputs]
// in blocks of 64 inputs. Also selects the piece's block and groups of connections.
template <class Tile, bool kRowsOfRight>
struct PatchPiece {
  static constexpr int kNeurons = kRowsOfRight ? Tile::kDepth : Tile::kColumns;
  static constexpr int kInputs = kRowsOfRight ? Tile::kColumns : Tile::kDepth;  // the width of a block
  static constexpr int kGroups = kNeurons / kGroupNeurons;
  static constexpr int kThreads = kSpareWarps * kWarp, kThreadsEach = kThreads / kGroups;
  static_assert(kNeurons % kGroupNeurons == 0 && kThreads % kGroups == 0);

  static __device__ __forceinline__ int place(int row, int column) {
    constexpr int kRow = kSwizzle / 2;
    return column / kRow * (kNeurons * kRow) + row * kRow + (column % kRow / 8 ^ row % 8) * 8 + column % 8;
  }
  static __device__ __forceinline__ int64_t block(TilePlace at, int32_t piece) {
    return kRowsOfRight ? at.column / kInputs : piece;
  }
  static __device__ __forceinline__ int32_t first_group(TilePlace at, int32_t piece) {
    return kRowsOfRight ? piece * kGroups : at.column / kGroupNeurons;
  }
};

__device__ __forceinline__ int spare_thread() { return threadIdx.x - kWarp; }

// A thread's connections in a piece: elements first, first + kThreadsEach, ... of its group's list.
struct OwnPatches {
  static constexpr int kHeld = 2;
  const BlockEntry* entry;
  int32_t first, count;
  BlockEntry held[kHeld];
  float delta[kHeld];
};

template <class Piece>
class PatchReader {
 public:
  __device__ __forceinline__ PatchReader(const Patches& a, TilePlace at) : a_(a), at_(at) {
    now_ = offsets();
    next_ = offsets();
    later_ = offsets();
    load_entries(now_);
    load_entries(next_);
    load_deltas(now_);
  }

  // Returns the patches of the next piece. Each load issued here depends only on loads of earlier calls.
  __device__ __forceinline__ OwnPatches next() {
    const OwnPatches given = now_;
    now_ = next_;
    load_deltas(now_);
    next_ = later_;
    load_entries(next_);
    later_ = offsets();
    return given;
  }

 private:
  __device__ __forceinline__ OwnPatches offsets() {
    const int32_t groups = (a_.d_out + kGroupNeurons - 1) / kGroupNeurons;
    const int64_t block = Piece::block(at_, piece_);
    const int32_t group = Piece::first_group(at_, piece_) + spare_thread() / Piece::kThreadsEach;
    ++piece_;
    OwnPatches own{};
    if (group >= groups || block >= a_.blocks) return own;
    const int32_t* start = a_.start + block * groups + group;
    own.entry = a_.entry + int64_t{group} * kGroupNeurons * a_.k + start[0];
    own.first = spare_thread() % Piece::kThreadsEach;
    own.count = start[groups] - start[0];
    return own;
  }
  __device__ __forceinline__ void load_entries(OwnPatches& own) const {
    NEUROADA_UNROLL
    for (int h = 0; h < OwnPatches::kHeld; ++h) {
      const int32_t i = own.first + h * Piece::kThreadsEach;
      own.held[h] = i < own.count ? own.entry[i] : BlockEntry{-1, 0, 0};
    }
  }
  __device__ __forceinline__ void load_deltas(OwnPatches& own) const {
    NEUROADA_UNROLL
    for (int h = 0; h < OwnPatches::kHeld; ++h) own.delta[h] = own.held[h].e >= 0 ? a_.delta[own.held[h].e] : 0.0f;
  }

  const Patches& a_;
  TilePlace at_;
  int32_t piece_ = 0;
  OwnPatches now_, next_, later_;
};

template <class T, class Piece>
__device__ __forceinline__ void patch_one(T* tile, const BlockEntry& entry, float delta) {
  const int row = spare_thread() / Piece::kThreadsEach * kGroupNeurons + entry.row;
  T* place = tile + Piece::place(row, entry.column);
  write_operand(place, round_to<T>(to_float(*place) + delta));
}

template <class T, class Piece>
__device__ __forceinline__ void patch_piece(T* tile, const OwnPatches& own, const float* delta) {
  NEUROADA_UNROLL
  for (int h = 0; h < OwnPatches::kHeld; ++h) {
    if (own.held[h].e >= 0) patch_one<T, Piece>(tile, own.held[h], own.delta[h]);
  }
  for (int32_t i = own.first + OwnPatches::kHeld * Piece::kThreadsEach; i < own.count; i += Piece::kThreadsEach) {
    patch_one<T, Piece>(tile, own.entry[i], delta[own.entry[i].e]);
  }
}

// For one warp: patches its share of every piece that this CTA multiplies.
template <class T, class Tile, bool kRowsOfRight>
__device__ __forceinline__ void patch_tiles(ProductShared<T, Tile>& shared, const Patches& a, const Grid& grid) {
  using Piece = PatchPiece<Tile, kRowsOfRight>;
  Stage stage;
  for (int64_t tile = blockIdx.x; tile < tiles_of(grid); tile += gridDim.x) {
    PatchReader<Piece> reader(a, place_of<Tile>(grid, tile));
    for (int32_t piece = 0; piece < pieces_of<Tile>(grid); ++piece, stage.advance<Tile::kStages>()) {
      const OwnPatches own = reader.next();
      wait(shared.full[stage.index], stage.parity);
      patch_piece<T, Piece>(shared.right[stage.index], own, a.delta);
      fence_operands();
      sync_warp();
      if (threadIdx.x % kWarp == 0) arrive(shared.patched[stage.index]);
    }
  }
}

}  // namespace neuroada::cuda
