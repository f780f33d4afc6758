// Bulk-copied blocks in double-buffered tiles: while a block is read from one tile, the next is transposed into the
// other, from one stage. The first half of a CTA's warps transposes its half of the columns before it reads, the second
// half after it reads, so that shared memory and the FMA pipe always both have work. There is one barrier per block.
#pragma once

#include "bulk_staging.cuh"

namespace neuroada::cuda {

// How blocks reach shared memory: loaded by the threads (staging.cuh), bulk-copied (bulk_staging.cuh), or bulk-copied
// into double-buffered tiles.
enum class Staging { loaded, copied, staggered };

// As StagedBlocks, for CTAs of at least two warps and rows of at least 16 columns.
template <class T>
struct StaggeredBlocks {
  static constexpr int V = kTokens<T>;
  const Tiles& tiles;
  const T* x;
  int64_t row_stride, tokens;
  int32_t begin, end;

  __device__ __forceinline__ void start() const {
#ifdef NEUROADA_HOPPER
    if (threadIdx.x == 0) {
      for (int i = 0; i < tiles.count; ++i) shared_quads()[i * tiles.stride + tiles.zero] = Quad{};
      static_assert((kRead + 1) * sizeof(Barrier) <= 2 * sizeof(Quad), "the barriers of two tiles");
      Barrier* const barriers = RawBlocks<T>::behind(tiles).full;
      init_barrier(barriers[0], 1);
      init_barrier(barriers[1], 1);
      init_barrier(barriers[kRead], CtaHalf::of(tiles).warps());
      publish_barriers();
    }
    __syncthreads();
    if (begin < end) copy(CtaHalf::of(tiles), begin);
#endif
  }

  template <int kParts, int, class Read>
  __device__ __forceinline__ void for_each(Read&& read) const {
#ifdef NEUROADA_HOPPER
    if (begin >= end) return;
    const CtaHalf own = CtaHalf::of(tiles);
    Quad* tile = shared_quads();
    Quad* other = tile + tiles.stride;
    transpose(own, tile, begin);
    __syncthreads();
    if (begin + 1 < end) copy(own, begin + 1);
    for (int32_t block = begin; block < end; ++block) {
      if (own.number == 0 && block + 1 < end) {
        transpose(own, other, block + 1);
        if (block + 2 < end) copy_when_read(own, block + 2);
      }
      read_in_turn<0, kParts>([&](auto part) { read(block, static_cast<const Quad*>(tile), 0, part); });
      if (own.number == 1 && block + 1 < end) transpose(own, other, block + 1);
      __syncthreads();  // the other tile is complete; all threads have read this one and the stage
      if (own.number == 1 && block + 2 < end) copy(own, block + 2);
      Quad* const read_now = tile;
      tile = other;
      other = read_now;
    }
#endif
  }

 private:
  static constexpr int kRead = 2;  // after both halves' barriers; counts warps of the first half that have read

  // Half of the CTA's threads, and the columns [from, to) that it transposes.
  struct CtaHalf {
    int number;
    int32_t from, to, thread;

    __device__ __forceinline__ static CtaHalf of(const Tiles& tiles) {
      const int32_t threads = blockDim.x / 2, middle = tiles.columns / 2 / 8 * 8;
      const int32_t thread = static_cast<int32_t>(threadIdx.x);
      if (thread < threads) return {0, 0, middle, thread};
      return {1, middle, tiles.columns, thread - threads};
    }
    __device__ __forceinline__ static int32_t threads() { return blockDim.x / 2; }
    __device__ __forceinline__ static uint32_t warps() { return blockDim.x / 2 / kWarp; }
  };

#ifdef NEUROADA_HOPPER
  // Starts the copy of a half of a block, one lane per row. All threads of the half have read the overwritten stage.
  __device__ __forceinline__ void copy(const CtaHalf& own, int32_t block) const {
    const RawBlocks<T> raw = RawBlocks<T>::behind(tiles);
    const int64_t t = int64_t{block} * V;
    const int32_t count = rows_of_block<T>(tokens, t);
    if (own.thread >= count) return;
    const uint32_t bytes = static_cast<uint32_t>(own.to - own.from) * sizeof(T);
    fence_operands();
    Barrier& full = raw.full[own.number];
    if (own.thread == 0) arrive_expecting(full, bytes * static_cast<uint32_t>(count));
    copy_bulk(raw.rows + own.thread * raw.pitch + own.from, x + (t + own.thread) * row_stride + own.from, bytes, full);
  }

  // The same by the half's first warp, once its other warps have read the stage.
  __device__ __forceinline__ void copy_when_read(const CtaHalf& own, int32_t block) const {
    Barrier& read = RawBlocks<T>::behind(tiles).full[kRead];
    sync_warp();
    if (own.thread % kWarp == 0) arrive(read);
    if (own.thread >= kWarp) return;
    wait(read, static_cast<uint32_t>(block - begin) & 1);
    copy(own, block);
  }

  // tile[place(c)] = column c of a block's half, zeros past its last row.
  __device__ __forceinline__ void transpose(const CtaHalf& own, Quad* tile, int32_t block) const {
    constexpr int32_t kColumns = Rows<T, 8>::kColumns;
    const RawBlocks<T> raw = RawBlocks<T>::behind(tiles);
    const int32_t count = rows_of_block<T>(tokens, int64_t{block} * V);
    wait(raw.full[own.number], static_cast<uint32_t>(block - begin) & 1);
    for (int32_t c = own.from + own.thread * kColumns; c < own.to; c += CtaHalf::threads() * kColumns) {
      Rows<T, 8> chunk;
      chunk.load(raw.rows, raw.pitch, count, c);
      chunk.store(tile, c);
    }
  }
#endif
};

// The type of a kernel's blocks.
template <class T, Staging kStaging>
struct BlocksOf {
  using type = StagedBlocks<T, kStaging == Staging::copied>;
};
template <class T>
struct BlocksOf<T, Staging::staggered> {
  using type = StaggeredBlocks<T>;
};

}  // namespace neuroada::cuda
