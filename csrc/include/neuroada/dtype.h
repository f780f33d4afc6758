// Element types of the kernels: two 16-bit storage types with scalar conversions that need no
// instruction set, and the accumulate type of each.
#pragma once

#include <cstdint>
#include <cstring>

namespace neuroada {

enum class DType : uint8_t { f32, f64, bf16, f16 };

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

template <class T>
struct AccumulateType {
  using type = float;
};
template <>
struct AccumulateType<double> {
  using type = double;
};
template <class T>
using accumulate_t = typename AccumulateType<T>::type;

// Calls f with a value of the C++ type that `dtype` names, of which only the type matters.
template <class F>
void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::bf16: return f(BFloat16{});
    case DType::f16: return f(Half{});
  }
}

static inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

static inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

static inline float widen(float value) { return value; }
static inline double widen(double value) { return value; }
static inline float widen(BFloat16 value) { return float_from_bits(uint32_t{value.bits} << 16); }

static inline float widen(Half value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = value.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_from_bits(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  if (magnitude >= 0x0400u) return float_from_bits(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return float_from_bits(sign | float_bits(subnormal));
}

// Rounding is to nearest, ties to even; a NaN stays a NaN.
static inline void narrow(float value, float& out) { out = value; }
static inline void narrow(double value, double& out) { out = value; }

static inline void narrow(float value, BFloat16& out) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {
    out.bits = static_cast<uint16_t>((bits >> 16) | 0x0040u);
    return;
  }
  out.bits = static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline void narrow(float value, Half& out) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000u) {
    // The ULP of 0.5f is that of a subnormal half, so the addition rounds.
    half = float_bits(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0x0fffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}

}  // namespace neuroada
