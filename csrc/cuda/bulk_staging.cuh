// Blocks of tokens that bulk asynchronous copies of sm_90a (cp.async.bulk) bring into shared memory untransposed, one
// or two ahead of the block that is read. The threads transpose them from there, so that loads in flight take no
// registers, and overlap with the reads.
#pragma once

#include "hopper.cuh"
#include "staging.cuh"

namespace neuroada::cuda {

// A step of the pipeline: the tile of a block from column `first` on.
struct Step {
  int32_t block, first;

  __device__ __forceinline__ void advance(const Tiles& tiles) {
    first += tiles.width;
    if (first >= tiles.columns) {
      first = 0;
      ++block;
    }
  }
  __device__ __forceinline__ int32_t width(const Tiles& tiles) const {
    return tiles.columns - first < tiles.width ? tiles.columns - first : tiles.width;
  }
};

// After the tile or tiles: barriers, then the stages. A stage holds a block's columns of one tile, row by row.
template <class T>
struct RawBlocks {
  static constexpr int V = kTokens<T>;
  Barrier* full;
  T* rows;
  int32_t pitch;

  __device__ __forceinline__ static RawBlocks behind(const Tiles& tiles) {
    static_assert(kMostStages * sizeof(Barrier) <= sizeof(Quad));
    Quad* barriers = shared_quads() + tiles.count * tiles.stride;
    return {reinterpret_cast<Barrier*>(barriers), reinterpret_cast<T*>(barriers + tiles.count), tiles.width};
  }

#ifdef NEUROADA_HOPPER
  __device__ __forceinline__ T* stage_rows(int stage) const { return rows + stage * (V * pitch); }

  // Starts the copy of `count` rows of x, one lane per row. All threads have read the overwritten stage and passed a
  // barrier; the fence orders those reads before the copies, which are in the async proxy.
  __device__ __forceinline__ void copy(int stage, const T* x, int64_t row_stride, int32_t count, int32_t width) const {
    const int32_t row = static_cast<int32_t>(threadIdx.x);
    const uint32_t bytes = static_cast<uint32_t>(width) * sizeof(T);
    if (row < count) fence_operands();
    if (row == 0) arrive_expecting(full[stage], bytes * static_cast<uint32_t>(count));
    if (row < count) copy_bulk(stage_rows(stage) + row * pitch, x + row * row_stride, bytes, full[stage]);
  }

  // tile[place(c)] = the c-th column of a stage, zeros past the last of `count` rows; by the whole CTA.
  __device__ __forceinline__ void transpose(Quad* tile, int stage, int32_t count, int32_t width) const {
    constexpr int32_t kColumns = Rows<T, 8>::kColumns;
    for (int32_t c = static_cast<int32_t>(threadIdx.x) * kColumns; c < width; c += blockDim.x * kColumns) {
      Rows<T, 8> chunk;
      chunk.load(stage_rows(stage), pitch, count, c);
      chunk.store(tile, c);
    }
  }
#endif
};

// The blocks [begin, end) of x, which a CTA stages one after another: loaded by its threads (staging.cuh), or
// bulk-copied, which takes rows and tiles of a multiple of 16 bytes.
template <class T, bool kBulk>
struct StagedBlocks {
  const Tiles& tiles;
  const T* x;
  int64_t row_stride, tokens;
  int32_t begin, end;

  // Starts the first copies, so that threads can load what they hold meanwhile.
  __device__ __forceinline__ void start() const {
#ifdef NEUROADA_HOPPER
    if constexpr (kBulk) {
      const RawBlocks<T> raw = RawBlocks<T>::behind(tiles);
      if (threadIdx.x == 0) {
        shared_quads()[tiles.zero] = Quad{};
        for (int i = 0; i < tiles.stages; ++i) init_barrier(raw.full[i], 1);
        publish_barriers();
      }
      __syncthreads();
      Step step{begin, 0};
      for (int i = 0; i < tiles.stages && step.block < end; ++i, step.advance(tiles)) copy(raw, i, step);
    }
#endif
  }

  // As for_each_block.
  template <int kParts, int kAtOnce, class Read>
  __device__ __forceinline__ void for_each(Read&& read) const {
    if constexpr (kBulk) {
      for_each_copied<kParts>(read, [](int32_t) {});
    } else {
      for_each_block<kParts, kAtOnce>(tiles, x, row_stride, tokens, begin, end, read);
    }
  }

  // The same for bulk-copied blocks, with a call of between(block) before a block is staged: all threads have read the
  // previous block, and none reads this one.
  template <class Read, class Between>
  __device__ __forceinline__ void for_each_and_between(Read&& read, Between&& between) const {
    static_assert(kBulk);
    for_each_copied<1>(read, between);
  }

 private:
#ifdef NEUROADA_HOPPER
  __device__ __forceinline__ void copy(const RawBlocks<T>& raw, int stage, const Step& step) const {
    const int64_t t = int64_t{step.block} * kTokens<T>;
    raw.copy(stage, x + t * row_stride + step.first, row_stride, rows_of_block<T>(tokens, t), step.width(tiles));
  }
#endif

  template <int kParts, class Read, class Between>
  __device__ __forceinline__ void for_each_copied(Read&& read, Between&& between) const {
#ifdef NEUROADA_HOPPER
    Quad* const tile = shared_quads();
    const RawBlocks<T> raw = RawBlocks<T>::behind(tiles);
    Step ahead{begin, 0};
    for (int i = 0; i < tiles.stages; ++i) ahead.advance(tiles);
    int stage = 0;
    uint32_t parity = 0;
    for (Step now{begin, 0}; now.block < end; now.advance(tiles)) {
      between(now.block);
      wait(raw.full[stage], parity);
      raw.transpose(tile, stage, rows_of_block<T>(tokens, int64_t{now.block} * kTokens<T>), now.width(tiles));
      __syncthreads();  // the tile is complete, and all threads have read the stage
      if (ahead.block < end) copy(raw, stage, ahead);
      ahead.advance(tiles);
      read_in_turn<0, kParts>([&](auto part) { read(now.block, static_cast<const Quad*>(tile), now.first, part); });
      __syncthreads();  // all threads have read the tile
      if (++stage == tiles.stages) {
        stage = 0;
        parity ^= 1;
      }
    }
#endif
  }
};

}  // namespace neuroada::cuda
