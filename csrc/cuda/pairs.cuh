// Pairs of adjacent neurons, of which a lane has one to eight. Both values of a token are moved together, and so are
// the places of both columns.
#pragma once

#include "staggered_staging.cuh"

namespace neuroada::cuda {

// The values of one token for both neurons.
template <class T>
struct PairOf {
  uint32_t word[sizeof(T) / 2];

  __device__ __forceinline__ float value(int neuron) const {
    if constexpr (sizeof(T) == 4) {
      return float_of_bits(word[neuron]);
    } else {
      return to_float(T{static_cast<uint16_t>(word[0] >> 16 * neuron)});
    }
  }
};

// The neurons of a lane: pair p is (first(p), first(p) + 1), as far as neurons are before `end`.
struct Pairs {
  int32_t begin, end;  // of the CTA

  // The neurons of part `part`, of `all`.
  __device__ __forceinline__ static Pairs of(int64_t part, int64_t neurons_per_part, int64_t all) {
    const int64_t begin = part * neurons_per_part, end = begin + neurons_per_part;
    return {static_cast<int32_t>(begin), static_cast<int32_t>(end < all ? end : all)};
  }
  __device__ __forceinline__ int32_t first(int p) const {
    return begin + 2 * static_cast<int32_t>(p * blockDim.x + opaque(threadIdx.x));
  }
  __device__ __forceinline__ bool has(int p, int neuron) const { return first(p) + neuron < end; }
};

// to[v] = a pair's values of the v-th of V rows from `from` on; zeros past the last of `rows` and past the last
// neuron. With `vectors` a whole pair is aligned to its size.
template <class T>
__device__ __forceinline__ void load_pairs(PairOf<T> (&to)[kTokens<T>], const T* from, int64_t stride, int rows,
                                           const Pairs& pairs, int pair, bool vectors) {
  const uint32_t first = pairs.first(pair);
  const bool both = pairs.has(pair, 1);
  if (vectors && both && rows == kTokens<T>) {  // nearly always
    NEUROADA_UNROLL
    for (int v = 0; v < kTokens<T>; ++v) load_words(in_row(from + v * stride, first), to[v].word);
    return;
  }
  NEUROADA_UNROLL
  for (int v = 0; v < kTokens<T>; ++v) to[v] = {};
  NEUROADA_ROLLED
  for (int v = 0; v < rows && pairs.has(pair, 0); ++v) {
    const T* at = in_row(from + v * stride, first);
    const T values[2] = {at[0], both ? at[1] : T{}};
    PairOf<T> read;
    std::memcpy(read.word, values, sizeof(values));
    NEUROADA_UNROLL
    for (int i = 0; i < kTokens<T>; ++i) {
      if (i == v) to[i] = read;
    }
  }
}

// Prefetches what load_pairs will read.
template <class T>
__device__ __forceinline__ void fetch_pairs(const T* from, int64_t stride, int rows, const Pairs& pairs, int pair) {
  if (rows != kTokens<T> || !pairs.has(pair, 0)) return;  // a partial last block is not prefetched
  NEUROADA_UNROLL
  for (int v = 0; v < kTokens<T>; ++v) prefetch_l2(in_row(from + v * stride, pairs.first(pair)));
}

// Whether both neurons of every pair can be read by one access, in rows of a matrix.
template <class T>
inline bool pairs_aligned(const T* matrix, int64_t stride, int64_t rows) {
  return reinterpret_cast<uintptr_t>(matrix) % (2 * sizeof(T)) == 0 && (rows <= 1 || stride % 2 == 0);
}

// The most connections per neuron that a lane holds: kFewHeld with a sum for each, kMostHeld for one pair without such
// sums, or with them in bulk-copied kernels, which leave more registers.
constexpr int kFewHeld = 8, kMostHeld = 20;

// Divides the slots that a lane holds, kHeld of each of kPairs pairs, into parts of the work on a block: whole pairs,
// or every kSplit-th slot of a pair if there are fewer pairs than parts, so that parts are equal for any number of
// slots.
template <int kPairs, int kHeld>
struct Held {
  // More parts take fewer registers: each has less of the next block in flight.
  static constexpr int kParts = kPairs > 1 ? 2 : 4;
  static constexpr int kSplit = kPairs < kParts ? kParts / kPairs : 1, kPairsAPart = kPairs * kSplit / kParts;
  static constexpr int kSlots = kHeld / kSplit;
  static_assert(kPairsAPart * kParts == kPairs * kSplit && kSlots * kSplit == kHeld);

  static constexpr __device__ __forceinline__ int first_pair(int part) { return part / kSplit * kPairsAPart; }
  static constexpr __device__ __forceinline__ bool begins_pair(int part) { return part % kSplit == 0; }
  static constexpr __device__ __forceinline__ bool ends_pair(int part) { return part % kSplit == kSplit - 1; }
  // Slots whose columns are read together, whether or not all exist: more take more registers.
  static constexpr int kTogether = kHeld > kFewHeld ? 1 : 2;
  // A part's first register of a pair; the slot that a register holds, and its inverse.
  static constexpr __device__ __forceinline__ int begin(int part) { return part % kSplit * kSlots; }
  static constexpr __device__ __forceinline__ int slot(int r) { return r % kSlots * kSplit + r / kSlots; }
  static constexpr __device__ __forceinline__ int register_of(int s) { return s / kSplit + s % kSplit * kSlots; }
};

// Slots that one access reads or writes, if each neuron's slots begin at a multiple of this number. Where a lane holds
// fewer, k is smaller, and no multiple.
constexpr int kSlotVector = 4;

inline bool slots_aligned(int64_t k, const void* a, const void* b) {
  const auto together = reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b);
  return k % kSlotVector == 0 && together % sizeof(Quad) == 0;
}

template <class Word>
__device__ __forceinline__ void load_slots(Word (&slots)[kSlotVector], const Word* from, bool there, Word absent) {
  static_assert(sizeof(slots) == sizeof(Quad));
  if (there) {
    const Quad quad = load16(from);
    std::memcpy(slots, quad.word, sizeof(slots));
    return;
  }
  NEUROADA_UNROLL
  for (int q = 0; q < kSlotVector; ++q) slots[q] = absent;
}

// The columns of slot s of both neurons of a pair, -1 where there is none.
__device__ __forceinline__ void load_columns(int32_t (&column)[2], const int32_t* index, int64_t k, const Pairs& pairs,
                                             int pair, int64_t s) {
  NEUROADA_UNROLL
  for (int n = 0; n < 2; ++n) {
    column[n] = s < k && pairs.has(pair, n) ? index[(int64_t{pairs.first(pair)} + n) * k + s] : -1;
  }
}

// The places of both columns of a slot, which fit 16 bits each.
__device__ __forceinline__ uint32_t places_of(const int32_t (&column)[2], const Tiles& tiles, int32_t first) {
  bool inside;
  const int low = place_in_tile(tiles, column[0], first, inside), high = place_in_tile(tiles, column[1], first, inside);
  return static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 16;
}

// The places that a lane holds if columns come in tiles: a place, with its tile's number in the bits above it. XOR with
// the number of the current tile makes a place of another tile greater than the place of zeros.
struct TilePlaces {
  static constexpr uint32_t kNone = 0xffff;  // no connection: no place in any tile
  static constexpr uint32_t kTwice = 0x10001;
  int bits;  // of a place

  __host__ __device__ static TilePlaces of(const Tiles& tiles) {
    int bits = 0;
    while (tiles.zero >> bits != 0) ++bits;
    return {bits};
  }
  // Whether 16 bits are enough for place and tile.
  bool fit(const Tiles& tiles) const { return bits <= 16 && (tiles.columns - 1) / tiles.width >> (16 - bits) == 0; }

  // The encoded places of both columns of a slot.
  __device__ __forceinline__ uint32_t operator()(const int32_t (&column)[2], const Tiles& tiles) const {
    uint32_t both = 0;
    NEUROADA_UNROLL
    for (int n = 0; n < 2; ++n) {
      const bool there = column[n] >= 0 && column[n] < tiles.columns;
      const int32_t tile = there ? column[n] / tiles.width : 0, offset = column[n] - tile * tiles.width;
      both |= (there ? static_cast<uint32_t>(tile << bits | place(offset)) : kNone) << 16 * n;
    }
    return both;
  }
  // The `tile` of in_tile for the tile that begins at column `first`.
  __device__ __forceinline__ uint32_t tile(const Tiles& tiles, int32_t first) const {
    return (static_cast<uint32_t>(first / tiles.width) << bits) * kTwice;
  }
  // Both places in that tile; the place of zeros for a column of another tile.
  __device__ __forceinline__ static uint32_t in_tile(uint32_t both, uint32_t tile, const Tiles& tiles) {
    return least_of_halves(both ^ tile, static_cast<uint32_t>(tiles.zero) * kTwice);
  }
};

// Returns 0, but the compiler does not know that it is the same for every block.
__device__ __forceinline__ uint32_t varying_zero(int32_t block) {
  return static_cast<uint32_t>((block + static_cast<int32_t>(threadIdx.x)) >> 31);
}

// The place of one neuron. With a constant zero, the compiler would unpack all places once, before the first block,
// which takes more registers than there are.
__device__ __forceinline__ uint32_t place_of(uint32_t places, int neuron, uint32_t zero) {
  return bytes_of(places, zero, neuron == 0 ? 0x4410 : 0x4432);
}

}  // namespace neuroada::cuda
