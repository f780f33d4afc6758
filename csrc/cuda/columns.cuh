// out[t, i] = x[t, columns[i]], copied unchanged, and zero for a column outside x.
//
// x [tokens, d_in], columns [count], out [tokens, count] without gaps. A warp copies a strip of adjacent columns of
// out, two per lane, for a part of the tokens: it reads its column indices once, and then keeps several rows in flight.
// With ascending columns, lanes share the sectors that they read. Two values are written by one store, which needs an
// aligned pair: in rows that start at an odd element, as every second row of an odd number of columns, all pairs are
// one column earlier.
#pragma once

#include "device.cuh"
#include "kernels.h"

namespace neuroada::cuda {

constexpr int kColumnsThreads = 256;  // of a CTA, at most
constexpr int kStripColumns = 2 * kWarp;
constexpr int kRowsAhead = 8;  // even, so that a row's parity is known where the loop is unrolled

struct ColumnsLaunch {
  ChosenColumns problem;
  int64_t strips, rows_per_part;  // rows a multiple of kRowsAhead
  int32_t early[2];               // for even and odd rows: by how many columns pairs are earlier, 0 or 1
};

// The positions of a lane's pair in a row of out, and of their values in a row of x.
struct PairOfColumns {
  int64_t first;      // position in out; the other is the next
  bool there[2];      // whether the row has this position
  int32_t column[2];  // -1 if outside x

  __device__ __forceinline__ void load(const ChosenColumns& p, int64_t place) {
    first = place;
    NEUROADA_UNROLL
    for (int n = 0; n < 2; ++n) {
      there[n] = place + n >= 0 && place + n < p.count;
      const int32_t wanted = there[n] ? p.columns[place + n] : -1;
      column[n] = wanted < p.d_in ? wanted : -1;
    }
  }
  __device__ __forceinline__ bool whole() const { return there[0] && there[1]; }
};

// Copies the first `rows` of kRowsAhead rows. `kAll`: rows is kRowsAhead, and x has a column 0, which is read in place
// of a column outside x, so that no load waits for a comparison.
template <bool kAll, class T>
__device__ __forceinline__ void copy_rows(const ChosenColumns& p, const PairOfColumns (&own)[2], const T* from, T* to,
                                          int rows) {
  T values[kRowsAhead][2];
  int64_t row = 0;
  NEUROADA_UNROLL
  for (int r = 0; r < kRowsAhead; ++r, row = opaque(row + p.x_stride)) {
    NEUROADA_UNROLL
    for (int n = 0; n < 2; ++n) {
      const int32_t column = own[r % 2].column[n];
      const bool read = kAll || (r < rows && column >= 0);
      values[r][n] = read ? from[row + (column < 0 ? 0 : column)] : T{0};
    }
  }
  NEUROADA_UNROLL
  for (int r = 0; r < kRowsAhead; ++r) {
    NEUROADA_UNROLL
    for (int n = 0; n < 2; ++n) {
      if (own[r % 2].column[n] < 0) values[r][n] = T{0};
    }
  }
  row = 0;
  if (own[0].whole() && own[1].whole()) {
    NEUROADA_UNROLL
    for (int r = 0; r < kRowsAhead; ++r, row = opaque(row + p.count)) {
      uint32_t words[sizeof(T) / 2];
      std::memcpy(words, values[r], sizeof(words));
      if (kAll || r < rows) store_words(to + row + own[r % 2].first, words);
    }
    return;
  }
  NEUROADA_UNROLL
  for (int r = 0; r < kRowsAhead; ++r, row = opaque(row + p.count)) {
    NEUROADA_UNROLL
    for (int n = 0; n < 2; ++n) {
      if ((kAll || r < rows) && own[r % 2].there[n]) to[row + own[r % 2].first + n] = values[r][n];
    }
  }
}

// T is an integer of the element's size.
template <class T>
__global__ void __launch_bounds__(kColumnsThreads) columns_kernel(ColumnsLaunch a) {
  const ChosenColumns& p = a.problem;
  const int64_t warp = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) / kWarp;
  const int64_t begin = warp / a.strips * a.rows_per_part;
  const int64_t end = begin + a.rows_per_part < p.tokens ? begin + a.rows_per_part : p.tokens;
  if (begin >= end) return;
  PairOfColumns own[2];  // in even and odd rows
  const int64_t pair = warp % a.strips * kWarp + threadIdx.x % kWarp;
  NEUROADA_UNROLL
  for (int odd = 0; odd < 2; ++odd) own[odd].load(p, 2 * pair - a.early[odd]);
  const T* from = static_cast<const T*>(p.x) + begin * p.x_stride;
  T* to = static_cast<T*>(p.out) + begin * p.count;
  int64_t t = begin;
  const auto next = [&] {
    t += kRowsAhead;
    from += kRowsAhead * p.x_stride;
    to += kRowsAhead * p.count;
  };
  if (p.d_in > 0) {
    for (; t + kRowsAhead <= end; next()) copy_rows<true>(p, own, from, to, kRowsAhead);
  }
  for (; t < end; next()) copy_rows<false>(p, own, from, to, static_cast<int>(end - t));
}

}  // namespace neuroada::cuda
