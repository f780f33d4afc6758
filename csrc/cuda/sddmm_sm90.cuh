// partial[row tile, j, s] = the sum over the tokens of one tile of dx of grad[t, j] x[t, index[j, s]]
//
// By the warps of the copying warpgroup that copy nothing. The tile of x, with the tokens and columns of the
// tile of dx, is staged once, transposed; the pieces of grad come through shared memory for the product
// anyway. A warp multiplies 16 neurons of a piece by eight columns of the staged x at a time, those of eight
// of their connections (mma); of the 16 x 8 sums eight are wanted. Every connection lies in one block of
// columns, so it has one sum for each tile of tokens, and a second kernel adds these in their order.
#pragma once

#include "kernels.h"
#include "product_sm90.cuh"
#include "staging.cuh"

namespace neuroada::cuda {

struct Sums {
  const void* x;  // [.., x_stride], from the launch's first token on, 16-byte rows
  int64_t x_stride;
  const int32_t* start;     // see BlockEntries; a block is a tile's columns
  const BlockEntry* entry;  // [d_out, k]
  float* partial;           // [row tiles, d_out, k]
  int32_t d_out, k;
};

constexpr int kBatch = 8;           // connections of one product
constexpr int kLanesEach = 4;       // of a connection's column
constexpr int kPartTokens = 32;     // of two steps of a product: a lane has 8 of them, in 16 bytes
constexpr int kStagedColumns = 64;  // by one warp at a time

// Beside what the product needs: x[column][tokens], in units of 8 tokens. Unit 4 p + q of a column has, in
// this order, tokens 32 p + 8 w + 2 q and the next for w of 0 to 3: those that mma expects of lane q.
template <class T, class Tile>
struct BackwardShared : ProductShared<T, Tile> {
  alignas(16) T x[Tile::kColumns * Tile::kRows];
};

// Columns and tokens outside the matrix are zeros; so is their grad.
template <class T, class Tile>
__device__ void stage_x(T* staged, const Sums& a, const Grid& grid, TilePlace at) {
  constexpr int kParts = Tile::kRows / kPartTokens, kItems = Tile::kColumns / kStagedColumns * kParts;
  const int lane = threadIdx.x % kWarp, quarter = lane % kLanesEach;
  NEUROADA_ROLLED
  for (int item = spare_warp(); item < kItems; item += kSpareWarps) {
    const int part = item % kParts, column = item / kParts * kStagedColumns + lane / kLanesEach * 8;
    const int32_t t = at.row + part * kPartTokens + quarter * 2, c = at.column + column;
    const T* from = static_cast<const T*>(a.x) + t * a.x_stride + c;
    Quad row[8];
    NEUROADA_UNROLL
    for (int v = 0; v < 8; ++v) {
      const int below = v / 2 * 8 + v % 2;
      row[v] = t + below < grid.rows && c < grid.columns ? load16(from + below * a.x_stride) : Quad{};
    }
    T* to = staged + column * Tile::kRows + (part * kLanesEach + quarter) * 8;
    NEUROADA_UNROLL
    for (int q = 0; q < 8; ++q) store16(to + q * Tile::kRows, transposed<T>(row, q));
  }
}

// The connections of one group in a block of columns, and of the first eight that of the lane.
struct GroupEntries {
  const BlockEntry* entry;
  int32_t count;
  BlockEntry first;
};

// What a warp will read of the connections, ahead of when: offsets two groups, and entries one.
class EntryReader {
 public:
  __device__ __forceinline__ EntryReader(const Sums& a, int64_t block)
      : a_(a), groups_((a.d_out + kGroupNeurons - 1) / kGroupNeurons), start_(a.start + block * groups_) {
    now_ = offsets();
    next_ = offsets();
    now_.first = load(now_, 0);
  }

  // Those of this warp's next group; groups go round the warps.
  __device__ __forceinline__ GroupEntries next() {
    const GroupEntries given = now_;
    now_ = next_;
    now_.first = load(now_, 0);
    next_ = offsets();
    return given;
  }

  // The lane's, of the eight from `i` on.
  static __device__ __forceinline__ BlockEntry load(const GroupEntries& group, int32_t i) {
    const int32_t at = i + static_cast<int32_t>(threadIdx.x % kWarp / kLanesEach);
    return at < group.count ? group.entry[at] : BlockEntry{-1, 0, 0};
  }

 private:
  __device__ __forceinline__ GroupEntries offsets() {
    const int32_t group = group_;
    group_ += kSpareWarps;
    if (group >= groups_) return {};
    const int32_t begin = start_[group], end = start_[groups_ + group];
    return {a_.entry + int64_t{group} * kGroupNeurons * a_.k + begin, end - begin, {}};
  }

  const Sums& a_;
  int32_t groups_, group_ = spare_warp();
  const int32_t* start_;  // of the block
  GroupEntries now_, next_;
};

// The grad of 16 neurons of a piece [tokens, 64 neurons], in the fragments of each step of 16 tokens.
template <class T, class Tile>
__device__ __forceinline__ void load_group(uint32_t (&grad)[Tile::kRows / 16][4], const T* piece, int group) {
  const int lane = threadIdx.x % kWarp, token = lane / 16 * 8 + lane % 8, unit = group * 2 + lane / 8 % 2;
  const T* row = piece + token * Tile::kDepth + (unit ^ token % 8) * 8;  // the swizzle of the copies
  NEUROADA_UNROLL
  for (int step = 0; step < Tile::kRows / 16; ++step) load_transposed(grad[step], row + step * 16 * Tile::kDepth);
}

// The columns of eight connections, as fragments: one of each four lanes. Two lanes that are served together,
// of neighbouring connections, read different halves of the banks.
template <class T, class Tile>
__device__ __forceinline__ void load_columns(uint32_t (&x)[Tile::kRows / 16][2], const T* column) {
  const int quarter = threadIdx.x % kLanesEach;
  const bool exchanged = threadIdx.x / kLanesEach % 2;
  NEUROADA_UNROLL
  for (int part = 0; part < Tile::kRows / kPartTokens; part += 2) {
    const Quad a = load16(column + ((part + exchanged) * kLanesEach + quarter) * 8);
    const Quad b = load16(column + ((part + !exchanged) * kLanesEach + quarter) * 8);
    NEUROADA_UNROLL
    for (int w = 0; w < 4; ++w) {
      x[part * 2 + w / 2][w % 2] = exchanged ? b.word[w] : a.word[w];
      x[part * 2 + 2 + w / 2][w % 2] = exchanged ? a.word[w] : b.word[w];
    }
  }
}

// Sums of even and of odd steps, so that two products at a time are under way.
template <class T, int kSteps>
__device__ __forceinline__ void multiply_batch(float (&sum)[4], const uint32_t (&grad)[kSteps][4],
                                               const uint32_t (&x)[kSteps][2]) {
  float odd[4] = {};
  NEUROADA_UNROLL
  for (int step = 0; step < kSteps; step += 2) {
    mma<T>(sum, grad[step], x[step]);
    mma<T>(odd, grad[step + 1], x[step + 1]);
  }
  NEUROADA_UNROLL
  for (int i = 0; i < 4; ++i) sum[i] += odd[i];
}

// A lane has the sums of neurons lane / 4 and that + 8 by connections 2 (lane % 4) and the next.
__device__ __forceinline__ void write_sums(float* partial, const float (&sum)[4], const BlockEntry& own) {
  const int lane = threadIdx.x % kWarp;
  NEUROADA_UNROLL
  for (int i = 0; i < 2; ++i) {
    const int from = (lane % 4 * 2 + i) * kLanesEach;
    const int32_t e = __shfl_sync(kAllLanes, own.e, from);
    const int row = __shfl_sync(kAllLanes, int32_t{own.row}, from);
    if (e >= 0 && row % 8 == lane / 4) partial[e] = row < 8 ? sum[i] : sum[2 + i];
  }
}

template <class T, class Tile>
__device__ __forceinline__ void sum_group(const GroupEntries& entries, const T* piece, int group, const T* staged,
                                          float* partial) {
  constexpr int kSteps = Tile::kRows / 16;
  if (entries.count == 0) return;
  uint32_t grad[kSteps][4];
  sync_warp();  // lanes may have come apart, and the warp loads and multiplies as one
  load_group<T, Tile>(grad, piece, group);
  BlockEntry own = entries.first;
  NEUROADA_ROLLED
  for (int32_t i = 0; i < entries.count; i += kBatch) {
    const BlockEntry next = EntryReader::load(entries, i + kBatch);
    uint32_t x[kSteps][2] = {};
    if (own.e >= 0) load_columns<T, Tile>(x, staged + own.column * Tile::kRows);
    float sum[4] = {};
    sync_warp();
    multiply_batch<T>(sum, grad, x);
    write_sums(partial, sum, own);
    own = next;
  }
}

// One warp: its sums of every tile that this CTA has. `name` is that of a barrier for these warps.
template <class T, class Tile>
__device__ __forceinline__ void sum_tiles(BackwardShared<T, Tile>& shared, const Sums& a, const Grid& grid, int name) {
  constexpr int kGroups = Tile::kDepth / kGroupNeurons;
  Stage stage;
  for (int64_t tile = blockIdx.x; tile < tiles_of(grid); tile += gridDim.x) {
    const TilePlace at = place_of<Tile>(grid, tile);
    EntryReader reader(a, at.column / Tile::kColumns);
    sync_threads<kSpareWarps * kWarp>(name);  // what was staged before has been read
    stage_x<T, Tile>(shared.x, a, grid, at);
    sync_threads<kSpareWarps * kWarp>(name);
    float* partial = a.partial + int64_t{at.row / Tile::kRows} * a.d_out * a.k;
    int group = spare_warp();
    for (int32_t piece = 0; piece < pieces_of<Tile>(grid); ++piece, stage.advance<Tile::kStages>()) {
      wait(shared.full[stage.index], stage.parity);
      for (; group < kGroups; group += kSpareWarps) {
        sum_group<T, Tile>(reader.next(), shared.left[stage.index], group, shared.x, partial);
      }
      group -= kGroups;
      sync_warp();
      if (threadIdx.x % kWarp == 0) arrive(shared.empty[stage.index]);
    }
  }
}

struct AddTilesLaunch {
  const float* partial;  // [tiles, count]
  const int32_t* index;  // [count]
  float* out;            // [count]
  int64_t tiles, count;
  int32_t d_in;
  bool first;  // out holds nothing yet
};

// out[e] += partial[0, e], then partial[1, e] and so on; zero where a slot has no connection.
__global__ static void add_tiles_kernel(AddTilesLaunch a) {
  const int64_t e = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (e >= a.count) return;
  float sum = a.first ? 0.0f : a.out[e];
  const bool live = a.index[e] >= 0 && a.index[e] < a.d_in;
  for (int64_t tile = 0; live && tile < a.tiles; ++tile) sum += a.partial[tile * a.count + e];
  a.out[e] = sum;
}

}  // namespace neuroada::cuda
