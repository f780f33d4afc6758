// Vectors of the width that the translation unit is compiled for, through the vector extensions of
// GCC and Clang: arithmetic is written once, the compiler picks SSE2, AVX2, AVX-512 or NEON.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "neuroada/dtype.h"
#include "sizes.h"

#if defined(__F16C__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

// CMakeLists.txt defines NEUROADA_VECTOR_BYTES, NEUROADA_AVX512_BF16 and NEUROADA_AMX_TILES for each copy. Compiler
// flags for all sources that enable more, as -march=native may, would compile every copy for the widest instruction
// set.
#if (defined(__AVX2__) && !defined(NEUROADA_VECTOR_BYTES)) ||      \
    (defined(__AVX512BF16__) && !defined(NEUROADA_AVX512_BF16)) || \
    (defined(__AMX_BF16__) && !defined(NEUROADA_AMX_TILES))
#error "flags name more than the instruction set of this copy, expected them for this target alone"
#endif

#ifndef NEUROADA_ISA
#error "NEUROADA_ISA names the instruction set, and the namespace, of this translation unit"
#endif

namespace neuroada::cpu::NEUROADA_ISA {

#ifdef NEUROADA_VECTOR_BYTES
inline constexpr int kVectorBytes = NEUROADA_VECTOR_BYTES;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class A>
inline constexpr int kLanes = kVectorBytes / sizeof(A);

// vector_size needs a non-dependent type, hence one specialisation each.
template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t mask __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t mask __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VectorOf<A>::type;

typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VecU16 __attribute__((vector_size(kVectorBytes / 2)));

template <class A>
inline Vec<A> zero() {
  return Vec<A>{};
}

template <class A>
inline Vec<A> broadcast(A value) {
  return value - Vec<A>{};
}

// Loads kLanes elements of storage type T, widened to the accumulate type.
template <class A>
inline Vec<A> load(const A* source) {
  Vec<A> value;
  std::memcpy(&value, source, sizeof(value));
  return value;
}

inline Vec<float> load(const BFloat16* source) {
  VecU16 narrow;
  std::memcpy(&narrow, source, sizeof(narrow));
  return (Vec<float>)(__builtin_convertvector(narrow, VecU32) << 16);
}

inline Vec<float> load(const Half* source) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#elif defined(__aarch64__)
  float16x4_t halves;
  std::memcpy(&halves, source, sizeof(halves));
  return (Vec<float>)vcvt_f32_f16(halves);
#else
  Vec<float> value;
  for (int lane = 0; lane < kLanes<float>; ++lane) value[lane] = widen(source[lane]);
  return value;
#endif
}

// Stores kLanes elements, rounded to nearest even.
template <class A>
inline void store(A* target, Vec<A> value) {
  std::memcpy(target, &value, sizeof(value));
}

inline void store(BFloat16* target, Vec<float> value) {
  const VecU32 bits = (VecU32)value;
  const VecU32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecU32 quiet = (bits >> 16) | 0x0040u;
  const VecU32 is_nan = (VecU32)(value != value);
  const VecU16 narrow = __builtin_convertvector((rounded & ~is_nan) | (quiet & is_nan), VecU16);
  std::memcpy(target, &narrow, sizeof(narrow));
}

#if defined(__AVX512F__)
// Lane i is low[i] and high[i] rounded to bfloat16 as store() does, high[i] in its upper half.
inline Vec<float> narrow_pairs(Vec<float> low, Vec<float> high) {
  const auto rounded = [](Vec<float> value) {  // in the upper half
    const VecU32 bits = (VecU32)value;
    const VecU32 is_nan = (VecU32)(value != value);
    return ((bits + 0x7fffu + ((bits >> 16) & 1u)) & ~is_nan) | ((bits | 0x400000u) & is_nan);
  };
  return (Vec<float>)((rounded(low) >> 16) | (rounded(high) & 0xffff0000u));
}
#endif

inline void store(Half* target, Vec<float> value) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(target), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  const float16x4_t halves = vcvt_f16_f32((float32x4_t)value);
  std::memcpy(target, &halves, sizeof(halves));
#else
  for (int lane = 0; lane < kLanes<float>; ++lane) narrow(value[lane], target[lane]);
#endif
}

// Lane numbers 0 to kLanes - 1 select from a, higher ones from b.
template <class A, int... lane>
inline Vec<A> shuffle(Vec<A> a, Vec<A> b, std::integer_sequence<int, lane...>) {
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, lane...);
#else
  return __builtin_shuffle(a, b, typename VectorOf<A>::mask{lane...});
#endif
}

// The two results of swapping blocks of `step` lanes across the diagonal of a pair of rows:
// low[lane] is a[lane] if lane lacks the bit `step`, otherwise b[lane - step];
// high[lane] is b[lane] if lane has the bit, otherwise a[lane + step].
template <class A, int step, int... lane>
inline Vec<A> exchange_low(Vec<A> a, Vec<A> b, std::integer_sequence<int, lane...>) {
  return shuffle<A>(a, b, std::integer_sequence<int, ((lane & step) ? kLanes<A> + lane - step : lane)...>{});
}
template <class A, int step, int... lane>
inline Vec<A> exchange_high(Vec<A> a, Vec<A> b, std::integer_sequence<int, lane...>) {
  return shuffle<A>(a, b, std::integer_sequence<int, ((lane & step) ? kLanes<A> + lane : lane + step)...>{});
}
template <class A>
using LaneSequence = std::make_integer_sequence<int, kLanes<A>>;

// Transposes kLanes x kLanes values in place (Eklundh): blocks of `step` swap across the diagonal.
template <class A, int step = kLanes<A> / 2>
inline void transpose(Vec<A>* rows) {
  if constexpr (step > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<A>; ++i) {
      if (i & step) continue;
      const Vec<A> a = rows[i], b = rows[i + step];
      rows[i] = exchange_low<A, step>(a, b, LaneSequence<A>{});
      rows[i + step] = exchange_high<A, step>(a, b, LaneSequence<A>{});
    }
    transpose<A, step / 2>(rows);
  }
}

// Lane i of the result is the sum over the lanes of rows[i]: the transpose, with an addition in each step.
template <class A, int step = kLanes<A> / 2>
inline Vec<A> sum_rows(Vec<A>* rows) {
  if constexpr (step > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < step; ++i) {
      const Vec<A> a = rows[i], b = rows[i + step];
      // Lanes without the bit `step` continue the sums of a, those with it the sums of b.
      rows[i] = exchange_low<A, step>(a, b, LaneSequence<A>{}) + exchange_high<A, step>(a, b, LaneSequence<A>{});
    }
    return sum_rows<A, step / 2>(rows);
  }
  return rows[0];
}

}  // namespace neuroada::cpu::NEUROADA_ISA
