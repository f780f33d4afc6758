// Compares the vector functions of one instruction set with scalar code. Compiled with the flags of
// that set, so nothing here may run before test_simd.cpp has checked the processor.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "check.h"
#include "cpu/simd.h"
#include "nearest.h"
#include "values16.h"

using namespace neuroada;
using namespace neuroada::testing;

namespace neuroada::cpu::NEUROADA_ISA {
namespace {

// Equal bits, or two NaNs: the processor keeps a NaN's payload, the scalar code does not.
template <class T>
bool agree(T a, T b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0 || (std::isnan(widen(a)) && std::isnan(widen(b)));
}

template <class T>
void load_is_widen() {
  constexpr int lanes = kLanes<float>;
  std::vector<T> values;
  for (uint32_t bits = 0; bits <= 0xffff + lanes; ++bits) values.push_back(T{static_cast<uint16_t>(bits)});
  // A step of one less than a vector: every value in every lane, at every alignment.
  for (size_t i = 0; i + lanes <= values.size(); i += lanes - 1) {
    const Vec<float> wide = load(values.data() + i);
    for (int lane = 0; lane < lanes; ++lane) {
      CHECK(agree(float{wide[lane]}, widen(values[i + lane])), "load of " + std::to_string(values[i + lane].bits));
    }
  }
}

template <class T>
void store_is_narrow() {
  constexpr int lanes = kLanes<float>;
  const std::vector<float> values = values_to_round<T>();
  for (size_t i = 0; i + lanes <= values.size(); i += lanes) {
    T stored[lanes + 2];
    stored[0].bits = stored[lanes + 1].bits = 0xabcd;
    store(stored + 1, load(values.data() + i));
    for (int lane = 0; lane < lanes; ++lane) {
      T scalar;
      narrow(values[i + lane], scalar);
      CHECK(agree(stored[lane + 1], scalar),
            "store of float with bits " + std::to_string(float_bits(values[i + lane])));
    }
    CHECK(stored[0].bits == 0xabcd && stored[lanes + 1].bits == 0xabcd, "store wrote beside its lanes");
  }
}

// Both halves are rounded as store() rounds them.
void narrow_pairs_is_store_of_both() {
#if defined(__AVX512F__)
  constexpr int lanes = kLanes<float>;
  const std::vector<float> values = values_to_round<BFloat16>();
  for (size_t i = 0; i + 2 * lanes <= values.size(); i += lanes) {
    const Vec<float> low = load(values.data() + i), high = load(values.data() + i + lanes);
    BFloat16 stored[2][lanes], pairs[2 * lanes];
    store(stored[0], low);
    store(stored[1], high);
    const Vec<float> narrowed = narrow_pairs(low, high);
    std::memcpy(pairs, &narrowed, sizeof(pairs));
    for (int j = 0; j < 2 * lanes; ++j) {
      CHECK(pairs[j].bits == stored[j % 2][j / 2].bits,
            "narrow_pairs of float with bits " + std::to_string(float_bits(values[i + j % 2 * lanes + j / 2])));
    }
  }
#endif
}

template <class A>
void load_store_and_broadcast_keep_bits() {
  constexpr int lanes = kLanes<A>;
  for (A value : {A{0}, -A{0}, A{1}, std::numeric_limits<A>::infinity(), std::numeric_limits<A>::denorm_min()}) {
    A target[lanes + 2];
    std::fill(target, target + lanes + 2, A{7});
    store(target + 1, broadcast(value));
    const Vec<A> again = load(target + 1);
    for (int lane = 0; lane < lanes; ++lane) {
      CHECK(agree(target[lane + 1], value) && agree(A{again[lane]}, value), "broadcast of " + std::to_string(value));
    }
    CHECK(target[0] == 7 && target[lanes + 1] == 7, "store wrote beside its lanes");
  }
}

template <class A>
void transpose_swaps_rows_and_lanes() {
  constexpr int lanes = kLanes<A>;
  Vec<A> rows[lanes];
  for (int i = 0; i < lanes; ++i) {
    for (int lane = 0; lane < lanes; ++lane) rows[i][lane] = A(i * lanes + lane);
  }
  transpose<A>(rows);
  for (int i = 0; i < lanes; ++i) {
    for (int lane = 0; lane < lanes; ++lane) {
      CHECK(rows[i][lane] == A(lane * lanes + i), "row " + std::to_string(i) + ", lane " + std::to_string(lane));
    }
  }
}

// Multiples of powers of two: each sum identifies its addends.
template <class A>
void sum_rows_sums_each_row_into_its_lane() {
  constexpr int lanes = kLanes<A>;
  Vec<A> rows[lanes];
  for (int i = 0; i < lanes; ++i) {
    for (int lane = 0; lane < lanes; ++lane) rows[i][lane] = std::ldexp(A(i + 1), lane);
  }
  const Vec<A> sums = sum_rows<A>(rows);
  for (int i = 0; i < lanes; ++i) {
    CHECK(sums[i] == A(i + 1) * A((1 << lanes) - 1), "row " + std::to_string(i));
  }
}

}  // namespace

void check_simd() {
  load_is_widen<BFloat16>();
  load_is_widen<Half>();
  store_is_narrow<BFloat16>();
  store_is_narrow<Half>();
  narrow_pairs_is_store_of_both();
  load_store_and_broadcast_keep_bits<float>();
  load_store_and_broadcast_keep_bits<double>();
  transpose_swaps_rows_and_lanes<float>();
  transpose_swaps_rows_and_lanes<double>();
  sum_rows_sums_each_row_into_its_lane<float>();
  sum_rows_sums_each_row_into_its_lane<double>();
}

}  // namespace neuroada::cpu::NEUROADA_ISA
