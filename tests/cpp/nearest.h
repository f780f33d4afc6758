// Rounding to a storage type by its definition: the nearest multiple of the ULP, ties to even, and
// infinity past the largest finite value.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "neuroada/dtype.h"

namespace neuroada::testing {

inline double nearest(double value, int digits, int min_exponent, double largest) {
  if (value == 0 || !std::isfinite(value)) return value;
  const double unit = std::ldexp(1.0, std::max(std::ilogb(value), min_exponent) - (digits - 1));
  const double rounded = std::nearbyint(value / unit) * unit;
  return std::abs(rounded) > largest ? std::copysign(std::numeric_limits<double>::infinity(), value) : rounded;
}

template <class T>
double nearest(double value);
template <>
inline double nearest<double>(double value) {
  return value;
}
template <>
inline double nearest<float>(double value) {
  return nearest(value, 24, -126, 0x1.fffffep127);
}
template <>
inline double nearest<BFloat16>(double value) {
  return nearest(value, 8, -126, 0x1.fep127);
}
template <>
inline double nearest<Half>(double value) {
  return nearest(value, 11, -14, 65504);
}

inline bool same_value(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

}  // namespace neuroada::testing
