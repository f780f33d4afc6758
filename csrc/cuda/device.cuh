// Wrappers of device intrinsics. Under NEUROADA_HOST_CUDA a host compiler builds the same kernels, and the tests'
// host_cuda.h runs them with a fiber per CUDA thread.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "neuroada/dtype.h"

#ifdef NEUROADA_HOST_CUDA
#include "host_cuda.h"
#define NEUROADA_UNROLL
#define NEUROADA_ROLLED
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define NEUROADA_UNROLL _Pragma("unroll")
#define NEUROADA_ROLLED _Pragma("unroll 1")
#endif

namespace neuroada::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// A kernel that is launched with Args.
template <class Args>
using KernelOf = void (*)(Args);

// Sixteen bytes: the widest shared-memory access of a lane.
struct alignas(16) Quad {
  uint32_t word[4];
};

#ifdef NEUROADA_HOST_CUDA

inline Quad* shared_quads() { return static_cast<Quad*>(host_cuda::shared_memory(alignof(Quad))); }

inline float float_of_bits(uint32_t bits) { return float_from_bits(bits); }
inline uint32_t bits_of_float(float value) { return float_bits(value); }
template <class T>
float to_float(T value) {
  return widen(value);
}
template <class T>
T round_to(float value) {
  T out;
  narrow(value, out);
  return out;
}

// Selects four of the eight bytes of low and high by the hexadecimal digits of `which`.
inline uint32_t bytes_of(uint32_t low, uint32_t high, uint32_t which) {
  const uint64_t both = uint64_t{high} << 32 | low;
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) word |= static_cast<uint32_t>(both >> 8 * (which >> 4 * i & 7) & 0xff) << 8 * i;
  return word;
}

// The minimum of two unsigned 16-bit values, for each half of a word.
inline uint32_t least_of_halves(uint32_t a, uint32_t b) {
  const uint32_t low = (a & 0xffff) < (b & 0xffff) ? a & 0xffff : b & 0xffff;
  return (a >> 16 < b >> 16 ? a >> 16 : b >> 16) << 16 | low;
}

inline void prefetch_l2(const void*) {}

inline Quad load16(const void* from) {
  host_cuda::check_aligned(from, sizeof(Quad));
  Quad value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}
inline void store16(void* to, const Quad& value) {
  host_cuda::check_aligned(to, sizeof(Quad));
  std::memcpy(to, &value, sizeof(value));
}
template <int N>
void load_words(const void* from, uint32_t (&word)[N]) {
  host_cuda::check_aligned(from, sizeof(word));
  std::memcpy(word, from, sizeof(word));
}
template <int N>
void store_words(void* to, const uint32_t (&word)[N]) {
  host_cuda::check_aligned(to, sizeof(word));
  std::memcpy(to, word, sizeof(word));
}
// The address of element `at` of a row: a base that all threads share plus a 32-bit offset, for which GPUs have an
// addressing mode, so that a row takes no address arithmetic.
template <class T>
T* in_row(T* row, uint32_t at) {
  return row + at;
}
// Increments the counter and returns its previous value.
inline uint32_t count_up(uint32_t* counter) { return atomicAdd(counter, 1u); }

// Two values rounded to T, packed as in memory.
template <class T>
void round_pair(float first, float second, uint32_t (&word)[sizeof(T) / 2]) {
  const T values[2] = {round_to<T>(first), round_to<T>(second)};
  std::memcpy(word, values, sizeof(word));
}

#else

__device__ __forceinline__ Quad* shared_quads() {
  extern __shared__ Quad neuroada_shared[];
  return neuroada_shared;
}

__device__ __forceinline__ float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t bits_of_float(float value) { return __float_as_uint(value); }

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(BFloat16 value) { return __uint_as_float(uint32_t{value.bits} << 16); }
__device__ __forceinline__ float to_float(Half value) { return __half2float(__ushort_as_half(value.bits)); }

template <class T>
__device__ T round_to(float value);
template <>
__device__ __forceinline__ float round_to<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ BFloat16 round_to<BFloat16>(float value) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
}
template <>
__device__ __forceinline__ Half round_to<Half>(float value) {
  return {__half_as_ushort(__float2half_rn(value))};
}

__device__ __forceinline__ uint32_t bytes_of(uint32_t low, uint32_t high, uint32_t which) {
  return __byte_perm(low, high, which);
}

// The minimum of two unsigned 16-bit values, for each half of a word.
__device__ __forceinline__ uint32_t least_of_halves(uint32_t a, uint32_t b) { return __vminu2(a, b); }

__device__ __forceinline__ uint32_t rounded_words(float first, float second, BFloat16) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(first, second);
  return uint32_t{__bfloat16_as_ushort(both.x)} | uint32_t{__bfloat16_as_ushort(both.y)} << 16;
}
__device__ __forceinline__ uint32_t rounded_words(float first, float second, Half) {
  const __half2 both = __floats2half2_rn(first, second);
  return uint32_t{__half_as_ushort(both.x)} | uint32_t{__half_as_ushort(both.y)} << 16;
}

// Prefetches a cache line to L2.
__device__ __forceinline__ void prefetch_l2(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

__device__ __forceinline__ Quad load16(const void* from) {
  const uint4 value = *static_cast<const uint4*>(from);
  return {{value.x, value.y, value.z, value.w}};
}
__device__ __forceinline__ void store16(void* to, const Quad& value) {
  *static_cast<uint4*>(to) = make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]);
}
template <int N>
__device__ __forceinline__ void load_words(const void* from, uint32_t (&word)[N]) {
  static_assert(N == 1 || N == 2);
  if constexpr (N == 1) {
    word[0] = *static_cast<const uint32_t*>(from);
  } else {
    const uint2 value = *static_cast<const uint2*>(from);
    word[0] = value.x;
    word[1] = value.y;
  }
}
template <int N>
__device__ __forceinline__ void store_words(void* to, const uint32_t (&word)[N]) {
  static_assert(N == 1 || N == 2);
  if constexpr (N == 1) {
    *static_cast<uint32_t*>(to) = word[0];
  } else {
    *static_cast<uint2*>(to) = make_uint2(word[0], word[1]);
  }
}
template <class T>
__device__ __forceinline__ T* in_row(T* row, uint32_t at) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(row) + static_cast<uint32_t>(at * sizeof(T)));
}
// Increments a counter in shared memory and returns its previous value. With a limit of 2^32 - 1 it would be an
// addition, which the compiler sums over the lanes first, not knowing that only one is active.
__device__ __forceinline__ uint32_t count_up(uint32_t* counter) {
  constexpr uint32_t kLimit = 0xfffffffe;
  uint32_t before;
  asm volatile("atom.shared.inc.u32 %0, [%1], %2;"
               : "=r"(before)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(counter))), "r"(kLimit)
               : "memory");
  return before;
}

// Two values rounded to T, packed as in memory.
template <class T>
__device__ __forceinline__ void round_pair(float first, float second, uint32_t (&word)[sizeof(T) / 2]) {
  if constexpr (sizeof(T) == 4) {
    word[0] = __float_as_uint(first);
    word[1] = __float_as_uint(second);
  } else {
    word[0] = rounded_words(first, second, T{});
  }
}

#endif

// Returns `value`, but hides from the compiler that it is the same: expressions of it in a loop are computed there, and
// take no register for the whole loop.
template <class T>
__device__ __forceinline__ T opaque(T value) {
#ifndef NEUROADA_HOST_CUDA
  if constexpr (sizeof(T) == 4) {
    asm volatile("" : "+r"(value));
  } else {
    asm volatile("" : "+l"(value));
  }
#endif
  return value;
}

// Element q of a Quad that holds 16 / sizeof(T) values of T.
template <class T>
__device__ __forceinline__ float element(const Quad& quad, int q) {
  if constexpr (sizeof(T) == 4) {
    return float_of_bits(quad.word[q]);
  } else {
    return to_float(T{static_cast<uint16_t>(quad.word[q / 2] >> (q % 2 * 16))});
  }
}

}  // namespace neuroada::cuda
