// The reduction dimension of a GEMM is held in *cells*: one lane multiplies one cell per instruction.
// A cell is one value widened to the accumulate type or, with AVX512-BF16, two neighbouring bfloat16
// values, unchanged.
#pragma once

#include "simd.h"

namespace neuroada::cpu::NEUROADA_ISA {

// target = value, widened where the types differ.
template <class T, class Element>
inline void widen_into(T value, Element& target) {
  if constexpr (std::is_same_v<T, Element>) {
    target = value;
  } else {
    target = widen(value);
  }
}

template <class T>
struct WideCell {
  using Source = T;
  using A = accumulate_t<T>;
  using Element = A;  // of W, as add() reads it
  static constexpr int kDepth = 1;
  static constexpr int64_t kShortSum = 64;  // cells summed before they are added to the total

  // kLanes cells of a row; one cell, of which `left` columns exist.
  static Vec<A> load_row(const T* source) { return load(source); }
  static A read(const T* source, int64_t) { return widen(*source); }

  // Vector v of the tokens of a column, from a block staged as [cell][block].
  template <int block>
  static Vec<A> column(const A* staged, int32_t column, int v) {
    return load(staged + int64_t{column} * block + v * kLanes<A>);
  }

  // In packed W, [cell][column], the offset of column c within a cell, in elements.
  static int64_t place(int64_t c) { return c; }
  static Vec<A> broadcast_weight(const A* weight) { return broadcast(*weight); }
  static void add(Vec<A>& sum, Vec<A> x, Vec<A> weight) { sum += x * weight; }
};

#ifdef NEUROADA_AVX512_BF16

// Byte-shuffle controls that widen the lower or the upper bfloat16 of each lane to float32; 0x80 yields a zero byte.
struct Widened {
  alignas(64) uint8_t bytes[2][64];
  constexpr Widened() : bytes() {
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 64; ++i) bytes[half][i] = static_cast<uint8_t>(i % 4 < 2 ? 0x80 : i % 16 - 2 + 2 * half);
    }
  }
};
inline constexpr Widened kWidened;

struct PairCell {
  using Source = BFloat16;
  using A = float;  // the bits of a pair, the lower column in the lower half
  using Element = BFloat16;
  static constexpr int kDepth = 2;
  // No short sums: rounding the output to bfloat16 is far coarser than rounding in the sum over a block's cells.
  static constexpr int64_t kShortSum = INT64_MAX;

  static Vec<float> load_row(const BFloat16* source) {
    Vec<float> pairs;
    std::memcpy(&pairs, source, sizeof(pairs));
    return pairs;
  }
  static float read(const BFloat16* source, int64_t left) {
    return float_from_bits(source[0].bits | (left > 1 ? uint32_t{source[1].bits} << 16 : 0));
  }

  template <int block>
  static Vec<float> column(const float* staged, int32_t column, int v) {
    const uint32_t cell = static_cast<uint32_t>(column) / 2, upper = static_cast<uint32_t>(column) % 2;
    const Vec<float> pairs = load(staged + int64_t{cell} * block + v * kLanes<float>);
    return (Vec<float>)_mm512_shuffle_epi8((__m512i)pairs, _mm512_load_si512(kWidened.bytes[upper]));
  }

  // The order in which unpacklo and unpackhi leave 32 columns of two rows: of each eight, the first four are in one
  // vector and the other four in the next.
  static int64_t place(int64_t c) { return c / 32 * 64 + c % 8 / 4 * 32 + c % 32 / 8 * 8 + c % 4 * 2; }
  static Vec<float> broadcast_weight(const BFloat16* weight) {
    int32_t pair;
    std::memcpy(&pair, weight, sizeof(pair));
    return (Vec<float>)_mm512_set1_epi32(pair);
  }
  // vdpbf16ps treats subnormal numbers as zero, as oneDNN's bfloat16 GEMM does.
  static void add(Vec<float>& sum, Vec<float> x, Vec<float> weight) {
    sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)weight);
  }
};

#endif

// Tokens per lane in a sum over tokens: one, or two with AVX512-BF16.
template <class T>
struct WideTokens {
  using A = accumulate_t<T>;
  static constexpr int kTokens = 1;
  static void add(Vec<A>& sum, Vec<A> a, Vec<A> b) { sum += a * b; }
};

#ifdef NEUROADA_AVX512_BF16
struct PairedTokens {
  static constexpr int kTokens = 2;
  static void add(Vec<float>& sum, Vec<float> a, Vec<float> b) { PairCell::add(sum, a, b); }
};
#endif

// How products of T are summed: `type` over columns, `tokens` over tokens.
template <class T>
struct ProductCell {
  using type = WideCell<T>;
  using tokens = WideTokens<T>;
};
#ifdef NEUROADA_AVX512_BF16
template <>
struct ProductCell<BFloat16> {
  using type = PairCell;
  using tokens = PairedTokens;
};
#endif

}  // namespace neuroada::cpu::NEUROADA_ISA
