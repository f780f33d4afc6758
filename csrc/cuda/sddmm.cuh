// out[j, s] = sum_t grad[t, j] x[t, index[j, s]]
//
// grad [tokens, d_out], x [tokens, d_in], index and out [d_out, k]. A CTA processes a part of the neurons and a part of
// the tokens. It stages x block by block as [column][V tokens]; a lane holds the places of its neurons' columns and
// their sums in registers, and loads its grad of a block while it reads the previous one. No atomics: the sums of each
// part of the tokens go to partial [parts, d_out, k], and a second kernel adds the parts in a fixed order, so that the
// result is the same in every run.
#pragma once

#include "kernels.h"
#include "pairs.cuh"

namespace neuroada::cuda {

struct SddmmLaunch {
  Sddmm problem;
  Tiles tiles;
  int64_t blocks;            // of tokens
  int64_t neurons_per_part;  // even
  int64_t slot_parts;        // blockIdx.x counts them within a part of the neurons
  int64_t slots;             // per such part, at most as many as a lane holds
  float* partial;            // [gridDim.y, d_out, k]
  bool pair_vectors, slot_vectors;
};

// Whether a lane of a bulk-copied kernel holds all slots of one pair instead of 8 of up to two pairs: a CTA has as many
// neurons, and no neuron is divided between CTAs.
inline bool holds_all_slots(int64_t k) { return k > kFewHeld && k <= kMostHeld; }

// The kernel with bulk-copied blocks: for one tile of all columns, for two of them, or for several narrower tiles if a
// lane holds all slots. Defined in sddmm_sm90.cu.
KernelOf<SddmmLaunch> sddmm_bulk_kernel(const Sddmm&, const Device&, const Tiles&);

// Prefetches grad[t .. t + V] of a pair.
template <class T>
__device__ __forceinline__ void fetch_grad(const SddmmLaunch& a, const Pairs& pairs, int pair, int64_t t) {
  const Sddmm& p = a.problem;
  fetch_pairs(static_cast<const T*>(p.grad) + t * p.grad_stride, p.grad_stride, rows_of_block<T>(p.tokens, t), pairs,
              pair);
}

// grad[t .. t + V] of a pair, zeros past the last token and neuron.
template <class T>
__device__ __forceinline__ void load_grad(PairOf<T> (&grad)[kTokens<T>], const SddmmLaunch& a, const Pairs& pairs,
                                          int pair, int64_t t) {
  const Sddmm& p = a.problem;
  load_pairs(grad, static_cast<const T*>(p.grad) + t * p.grad_stride, p.grad_stride, rows_of_block<T>(p.tokens, t),
             pairs, pair, a.pair_vectors);
}

// The columns of the slot that a lane's register r holds, -1 if there is none.
template <int kPairs, int kHeld>
__device__ __forceinline__ void columns_of_slot(int32_t (&column)[2], const SddmmLaunch& a, const Pairs& pairs,
                                                int pair, int64_t slot, int r) {
  const int64_t s = Held<kPairs, kHeld>::slot(r);
  load_columns(column, a.problem.index, a.problem.k, pairs, pair, s < a.slots ? slot + s : a.problem.k);
}

// The places that a lane holds for both columns of a slot, and for no column: in the tile of all columns, or among all
// tiles.
template <bool kWhole>
struct HeldPlaces {
  __device__ __forceinline__ static uint32_t of(const int32_t (&column)[2], const Tiles& tiles) {
    return kWhole ? places_of(column, tiles, 0) : TilePlaces::of(tiles)(column, tiles);
  }
  __device__ __forceinline__ static uint32_t none(const Tiles& tiles) {
    return kWhole ? static_cast<uint32_t>(tiles.zero) : TilePlaces::kNone;
  }
};

template <class T>
__device__ __forceinline__ float add_dot(float sum, const float (&grad)[kTokens<T>], const Quad& column) {
  NEUROADA_UNROLL
  for (int v = 0; v < kTokens<T>; ++v) sum += grad[v] * element<T>(column, v);
  return sum;
}

// The places of all slots of a lane.
template <bool kWhole, int kPairs, int kHeld>
__device__ __forceinline__ void load_places(uint32_t (&places)[kPairs][kHeld], const SddmmLaunch& a, const Pairs& pairs,
                                            int64_t slot, int slots) {
  using H = Held<kPairs, kHeld>;
  NEUROADA_UNROLL
  for (int pair = 0; pair < kPairs; ++pair) {
    if (!a.slot_vectors) {
      NEUROADA_UNROLL
      for (int r = 0; r < kHeld; ++r) {
        int32_t column[2];
        columns_of_slot<kPairs, kHeld>(column, a, pairs, pair, slot, r);
        places[pair][r] = HeldPlaces<kWhole>::of(column, a.tiles);
      }
      continue;
    }
    NEUROADA_UNROLL
    for (int s = 0; s + kSlotVector <= kHeld; s += kSlotVector) {
      int32_t column[2][kSlotVector];
      NEUROADA_UNROLL
      for (int n = 0; n < 2; ++n) {
        const int64_t e = (int64_t{pairs.first(pair)} + n) * a.problem.k + slot + s;
        load_slots(column[n], a.problem.index + e, s < slots && pairs.has(pair, n), -1);
      }
      NEUROADA_UNROLL
      for (int q = 0; q < kSlotVector; ++q) {
        places[pair][H::register_of(s + q)] = HeldPlaces<kWhole>::of({column[0][q], column[1][q]}, a.tiles);
      }
    }
  }
}

// Writes the sums of this part of the tokens; zero in a slot without a connection.
template <bool kWhole, bool kHolds, int kPairs, int kHeld>
__device__ __forceinline__ void write_sums(const float (&sum)[kPairs][kHeld][2],
                                           const uint32_t (&places)[kPairs][kHeld], const SddmmLaunch& a,
                                           const Pairs& pairs, int64_t slot, int slots) {
  using H = Held<kPairs, kHeld>;
  const Sddmm& p = a.problem;
  float* partial = a.partial + blockIdx.y * p.d_out * p.k;
  NEUROADA_UNROLL
  for (int pair = 0; pair < kPairs; ++pair) {
    NEUROADA_UNROLL
    for (int n = 0; n < 2; ++n) {
      if (!pairs.has(pair, n)) continue;
      const int64_t e = (int64_t{pairs.first(pair)} + n) * p.k + slot;
      // The sum of a slot without a connection is not zero where grad is infinite.
      const auto sum_of = [&](int s) {
        const int r = H::register_of(s);
        const bool connected = kHolds ? place_of(places[pair][r], n, 0) != HeldPlaces<kWhole>::none(a.tiles)
                                      : static_cast<uint32_t>(p.index[e + s]) < static_cast<uint32_t>(p.d_in);
        return connected ? sum[pair][r][n] : 0.0f;
      };
      if (kHolds && a.slot_vectors) {
        NEUROADA_UNROLL
        for (int s = 0; s + kSlotVector <= kHeld; s += kSlotVector) {
          const float four[kSlotVector] = {sum_of(s), sum_of(s + 1), sum_of(s + 2), sum_of(s + 3)};
          Quad quad;
          std::memcpy(quad.word, four, sizeof(quad));
          if (s < slots) store16(partial + e + s, quad);
        }
        continue;
      }
      NEUROADA_UNROLL
      for (int s = 0; s < kHeld; ++s) {
        if (s < slots) partial[e + s] = sum_of(s);
      }
    }
  }
}

// A lane holds its places if a tile has all columns or if tiles are bulk-copied. Then the tiles of a block follow one
// another, and grad is loaded again for each.
template <class T, int kPairs, int kHeld, bool kWhole, Staging kStaging>
__global__ void __launch_bounds__(kMaxThreads, 1) sddmm_kernel(SddmmLaunch a) {
  constexpr int V = kTokens<T>;
  constexpr bool kBulk = kStaging != Staging::loaded;
  constexpr bool kHolds = kWhole || kBulk;
  using H = Held<kPairs, kHeld>;
  // Slots whose columns are read together: with bulk copies there are registers for two.
  constexpr int kTogether = kBulk ? 2 : 1;
  const Sddmm& p = a.problem;
  const Pairs pairs = Pairs::of(blockIdx.x / a.slot_parts, a.neurons_per_part, p.d_out);
  const int64_t slot = blockIdx.x % a.slot_parts * a.slots;
  const int slots = static_cast<int>(p.k - slot < a.slots ? p.k - slot : a.slots);
  const int32_t begin = static_cast<int32_t>(a.blocks * blockIdx.y / gridDim.y);
  const int32_t end = static_cast<int32_t>(a.blocks * (blockIdx.y + 1) / gridDim.y);
  const typename BlocksOf<T, kStaging>::type blocks{a.tiles, static_cast<const T*>(p.x), p.x_stride, p.tokens, begin,
                                                    end};
  blocks.start();
  uint32_t places[kPairs][kHeld] = {};
  float sum[kPairs][kHeld][2] = {}, grad[2][V];
  const TilePlaces tile_places = TilePlaces::of(a.tiles);
  if (kHolds) load_places<kWhole>(places, a, pairs, slot, slots);
  PairOf<T> next[V];  // grad of the pair that is read next, in flight
  if (kHolds) load_grad(next, a, pairs, 0, int64_t{begin} * V);
  const auto read = [&](int32_t block, const Quad* tile, int32_t first, auto part) {
    constexpr int kPart = decltype(part)::value, kBegin = H::begin(kPart), kFirst = H::first_pair(kPart);
    const int32_t next_block = kWhole || first + a.tiles.width >= a.tiles.columns ? block + 1 : block;
    const uint32_t in_tile = kHolds && !kWhole ? tile_places.tile(a.tiles, first) : 0;
    NEUROADA_UNROLL
    for (int pair = kFirst; pair < kFirst + H::kPairsAPart; ++pair) {
      if (H::begins_pair(kPart)) {
        if (!kHolds) load_grad(next, a, pairs, pair, int64_t{block} * V);
        if (kHolds && first == 0 && block + 2 < end) fetch_grad<T>(a, pairs, pair, (int64_t{block} + 2) * V);
        NEUROADA_UNROLL
        for (int v = 0; v < V; ++v) {
          grad[0][v] = next[v].value(0);
          grad[1][v] = next[v].value(1);
        }
        if (kHolds && pair + 1 < kPairs) {
          load_grad(next, a, pairs, pair + 1, int64_t{block} * V);
        } else if (kHolds && next_block < end) {
          load_grad(next, a, pairs, 0, int64_t{next_block} * V);
        }
      }
      if (!pairs.has(pair, 0)) continue;
      NEUROADA_UNROLL
      for (int r = kBegin; r < kBegin + H::kSlots; ++r) {
        if ((r - kBegin) % kTogether == 0 && H::slot(r) >= slots) break;
        uint32_t both = places[pair][r];
        if constexpr (!kHolds) {
          int32_t column[2];
          columns_of_slot<kPairs, kHeld>(column, a, pairs, pair, slot, r);
          both = places_of(column, a.tiles, first);
        } else if constexpr (!kWhole) {
          both = TilePlaces::in_tile(both, in_tile, a.tiles);
        }
        NEUROADA_UNROLL
        for (int n = 0; n < 2; ++n) {
          const uint32_t at = place_of(both, n, varying_zero(block));
          const float with = add_dot<T>(sum[pair][r][n], grad[n], tile[at]);
          // Zeros for a column of another tile would give NaN if grad is infinite.
          if (kWhole || at != static_cast<uint32_t>(a.tiles.zero)) sum[pair][r][n] = with;
        }
      }
    }
  };
  blocks.template for_each<H::kParts, 1>(read);
  write_sums<kWhole, kHolds>(sum, places, a, pairs, slot, slots);
}

}  // namespace neuroada::cuda
