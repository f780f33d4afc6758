// out[t, j] = base[t, j] + bias[j] + sum_s delta[j, s] x[t, index[j, s]]
//
// x [tokens, d_in], index and delta [d_out, k], base and out [tokens, d_out], bias [d_out]. A CTA processes a part of
// the neurons and a part of the tokens. It stages x block by block as [column][V tokens]; a lane holds the places of
// its neurons' columns and their deltas in registers, so that a block only costs its gathers. A lane writes two
// adjacent neurons of out at a time.
#pragma once

#include "kernels.h"
#include "pairs.cuh"

namespace neuroada::cuda {

struct BypassFwdLaunch {
  BypassFwd problem;
  Tiles tiles;
  int64_t blocks;            // of tokens
  int64_t neurons_per_part;  // even
  bool slot_vectors;
  bool vectors;  // a pair of out is one store, and a pair of base one load
};

// The kernel with bulk-copied blocks, for one tile of all columns or two such tiles; defined in bypass_fwd_sm90.cu.
KernelOf<BypassFwdLaunch> bypass_fwd_bulk_kernel(const BypassFwd&, const Device&, const Tiles&);

// The connections of slot s of a pair: places in the tile that starts at `first`, and deltas.
struct Connections {
  uint32_t places;
  float delta[2];

  __device__ __forceinline__ void load(const BypassFwdLaunch& a, const Pairs& pairs, int pair, int64_t s,
                                       int32_t first) {
    const BypassFwd& p = a.problem;
    int32_t column[2];
    load_columns(column, p.index, p.k, pairs, pair, s);
    places = places_of(column, a.tiles, first);
    NEUROADA_UNROLL
    for (int n = 0; n < 2; ++n) {
      const bool there = place_of(places, n, 0) != static_cast<uint32_t>(a.tiles.zero);
      delta[n] = there ? p.delta[(int64_t{pairs.first(pair)} + n) * p.k + s] : 0.0f;
    }
  }
};

// All connections of a lane, in the tile that has all columns.
template <int kPairs, int kHeld>
__device__ __forceinline__ void load_connections(Connections (&own)[kPairs][kHeld], const BypassFwdLaunch& a,
                                                 const Pairs& pairs) {
  using H = Held<kPairs, kHeld>;
  const BypassFwd& p = a.problem;
  NEUROADA_UNROLL
  for (int pair = 0; pair < kPairs; ++pair) {
    if (!a.slot_vectors) {
      NEUROADA_UNROLL
      for (int r = 0; r < kHeld; ++r) own[pair][r].load(a, pairs, pair, H::slot(r), 0);
      continue;
    }
    NEUROADA_UNROLL
    for (int s = 0; s + kSlotVector <= kHeld; s += kSlotVector) {
      int32_t column[2][kSlotVector];
      float delta[2][kSlotVector];
      NEUROADA_UNROLL
      for (int n = 0; n < 2; ++n) {
        const int64_t e = (int64_t{pairs.first(pair)} + n) * p.k + s;
        const bool there = s < p.k && pairs.has(pair, n);
        load_slots(column[n], p.index + e, there, -1);
        load_slots(delta[n], p.delta + e, there, 0.0f);
      }
      NEUROADA_UNROLL
      for (int q = 0; q < kSlotVector; ++q) {
        Connections& one = own[pair][H::register_of(s + q)];
        one.places = places_of({column[0][q], column[1][q]}, a.tiles, 0);
        NEUROADA_UNROLL
        for (int n = 0; n < 2; ++n) {
          const bool connected = place_of(one.places, n, 0) != static_cast<uint32_t>(a.tiles.zero);
          one.delta[n] = connected ? delta[n][q] : 0.0f;
        }
      }
    }
  }
}

// sum[n] += delta (the staged column), for both neurons of a pair
template <class T>
__device__ __forceinline__ void add_connections(float (&sum)[2][kTokens<T>], const Connections& own, const Quad* tile,
                                                int32_t zero) {
  NEUROADA_UNROLL
  for (int n = 0; n < 2; ++n) add_column<T>(sum[n], own.delta[n], tile[place_of(own.places, n, zero)]);
}

template <class Base, int V>
__device__ __forceinline__ void load_rows(float (&onto)[V][2], const void* base, int64_t stride, int64_t t,
                                          uint32_t j) {
  NEUROADA_UNROLL
  for (int v = 0; v < V; ++v) {
    PairOf<Base> both;
    load_words(in_row(static_cast<const Base*>(base) + (t + v) * stride, j), both.word);
    onto[v][0] = both.value(0);
    onto[v][1] = both.value(1);
  }
}

// Prefetches a pair of a float32 base to L2, where it may not be yet.
template <class T>
__device__ __forceinline__ void fetch_base(const BypassFwdLaunch& a, const Pairs& pairs, int pair, int64_t t) {
  const BypassFwd& p = a.problem;
  if (!p.wide_base) return;
  const float* base = static_cast<const float*>(p.base) + t * p.base_stride;
  const int rows = rows_of_block<T>(p.tokens, t);
  if (rows != kTokens<T> || !pairs.has(pair, 0)) return;
  NEUROADA_UNROLL
  for (int v = 0; v < kTokens<T>; ++v) prefetch_l2(in_row(base + v * p.base_stride, pairs.first(pair)));
}

// onto = base[t .. t + V, j .. j + 2]
template <class T>
__device__ __forceinline__ void load_base(float (&onto)[kTokens<T>][2], const BypassFwd& p, int64_t t, uint32_t j) {
  if (p.wide_base) {
    load_rows<float>(onto, p.base, p.base_stride, t, j);
  } else {
    load_rows<T>(onto, p.base, p.base_stride, t, j);
  }
}

// out = sum, for a whole pair and V tokens, if nothing is added.
template <class T>
__device__ __forceinline__ void write_rows(const float (&sum)[2][kTokens<T>], T* out, int64_t stride) {
  NEUROADA_UNROLL
  for (int v = 0; v < kTokens<T>; ++v, out += stride) {
    PairOf<T> both;
    round_pair<T>(sum[0][v], sum[1][v], both.word);
    store_words(out, both.word);
  }
}

// out = base + (bias + sum), for a pair and V tokens: added in float32, and rounded once.
template <class T>
__device__ __forceinline__ void write_pair(const float (&sum)[2][kTokens<T>], const BypassFwdLaunch& a,
                                           const Pairs& pairs, int pair, int64_t t) {
  constexpr int V = kTokens<T>;
  const BypassFwd& p = a.problem;
  const int rows = rows_of_block<T>(p.tokens, t);
  const uint32_t j = pairs.first(pair);
  T* out = static_cast<T*>(p.out) + t * p.out_stride;
  const T* bias = static_cast<const T*>(p.bias);
  if (a.vectors && pairs.has(pair, 1) && rows == V && p.base == nullptr && bias == nullptr) {
    write_rows<T>(sum, out + j, p.out_stride);
    return;
  }
  float added[2] = {};
  NEUROADA_UNROLL
  for (int n = 0; n < 2; ++n) {
    if (bias != nullptr && pairs.has(pair, n)) added[n] = to_float(bias[j + n]);
  }
  if (a.vectors && pairs.has(pair, 1) && rows == V) {
    float onto[V][2] = {};
    if (p.base != nullptr) load_base<T>(onto, p, t, j);
    NEUROADA_UNROLL
    for (int v = 0; v < V; ++v) {
      PairOf<T> both;
      round_pair<T>(onto[v][0] + (added[0] + sum[0][v]), onto[v][1] + (added[1] + sum[1][v]), both.word);
      store_words(in_row(out + v * p.out_stride, j), both.word);
    }
    return;
  }
  NEUROADA_UNROLL
  for (int v = 0; v < V; ++v) {
    if (v >= rows) break;
    NEUROADA_UNROLL
    for (int n = 0; n < 2; ++n) {
      if (!pairs.has(pair, n)) break;
      const int64_t from = (t + v) * p.base_stride + j + n;
      float onto = 0;
      if (p.base != nullptr) {
        onto = p.wide_base ? static_cast<const float*>(p.base)[from] : to_float(static_cast<const T*>(p.base)[from]);
      }
      *in_row(out + v * p.out_stride, j + n) = round_to<T>(onto + (added[n] + sum[n][v]));
    }
  }
}

template <class T, int kPairs, int kHeld, bool kWhole, Staging kStaging>
__global__ void __launch_bounds__(kMaxThreads, 1) bypass_fwd_kernel(BypassFwdLaunch a) {
  constexpr int V = kTokens<T>;
  using H = Held<kPairs, kHeld>;
  const BypassFwd& p = a.problem;
  const Pairs pairs = Pairs::of(blockIdx.x, a.neurons_per_part, p.d_out);
  const int32_t begin = static_cast<int32_t>(a.blocks * blockIdx.y / gridDim.y);
  const int32_t end = static_cast<int32_t>(a.blocks * (blockIdx.y + 1) / gridDim.y);
  const typename BlocksOf<T, kStaging>::type blocks{a.tiles, static_cast<const T*>(p.x), p.x_stride, p.tokens, begin,
                                                    end};
  blocks.start();
  Connections own[kPairs][kHeld];
  if (kWhole) load_connections(own, a, pairs);
  const int k = static_cast<int>(p.k < kHeld ? p.k : kHeld);
  float sum[2][V];
  const auto read = [&](int32_t block, const Quad* tile, int32_t first, auto part) {
    constexpr int kPart = decltype(part)::value, kBegin = H::begin(kPart), kFirst = H::first_pair(kPart);
    const bool last_tile = kWhole || first + a.tiles.width >= a.tiles.columns;
    NEUROADA_UNROLL
    for (int pair = kFirst; pair < kFirst + H::kPairsAPart; ++pair) {
      if (!pairs.has(pair, 0)) continue;
      if (H::begins_pair(kPart) && first == 0) {
        NEUROADA_UNROLL
        for (int v = 0; v < V; ++v) sum[0][v] = sum[1][v] = 0;
        fetch_base<T>(a, pairs, pair, int64_t{block} * V);
      }
      if (kWhole) {
        NEUROADA_UNROLL
        for (int r = kBegin; r < kBegin + H::kSlots; ++r) {
          if ((r - kBegin) % H::kTogether == 0 && H::slot(r) >= k) break;
          add_connections<T>(sum, own[pair][r], tile, varying_zero(block));
        }
      } else {
        for (int64_t s = kPart; s < p.k; s += H::kParts) {
          Connections one;
          one.load(a, pairs, pair, s, first);
          add_connections<T>(sum, one, tile, 0);
        }
      }
      if (last_tile && H::ends_pair(kPart)) write_pair<T>(sum, a, pairs, pair, int64_t{block} * V);
    }
  };
  blocks.template for_each<H::kParts, 1>(read);
}

}  // namespace neuroada::cuda
