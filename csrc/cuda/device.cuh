// What device code needs and a host lacks, wrapped once. Under NEUROADA_HOST_CUDA a host compiler
// builds the same kernels, and host_cuda.h of the tests runs them, a thread for each of CUDA's.
#pragma once

#include <cstdint>
#include <cstring>

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

// Sixteen bytes: what one shared-memory access of a lane serves.
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

__device__ __forceinline__ Quad load16(const void* from) {
  const uint4 value = *static_cast<const uint4*>(from);
  return {{value.x, value.y, value.z, value.w}};
}
__device__ __forceinline__ void store16(void* to, const Quad& value) {
  *static_cast<uint4*>(to) = make_uint4(value.word[0], value.word[1], value.word[2], value.word[3]);
}

#endif

// Element q of a Quad that holds 16 / sizeof(T) of T.
template <class T>
__device__ __forceinline__ float element(const Quad& quad, int q) {
  if constexpr (sizeof(T) == 4) {
    return float_of_bits(quad.word[q]);
  } else {
    return to_float(T{static_cast<uint16_t>(quad.word[q / 2] >> (q % 2 * 16))});
  }
}

}  // namespace neuroada::cuda
