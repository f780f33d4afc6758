// float32 values at which a conversion to a 16-bit type can go wrong.
#pragma once

#include <cmath>
#include <vector>

#include "neuroada/dtype.h"

namespace neuroada::testing {

// Each value of T and each tie between two, with their neighbours in float32; and a sweep over the
// float32 bit patterns in steps of kStep, plus special patterns: subnormals, infinities and NaNs.
template <class T>
std::vector<float> values_to_round() {
  std::vector<float> values;
  const auto around = [&](float value) {
    for (float v : {value, std::nextafter(value, INFINITY), std::nextafter(value, -INFINITY)}) {
      values.push_back(v);
      values.push_back(-v);
    }
  };
  for (uint32_t bits = 0; bits < 0x7fff; ++bits) {
    const float value = widen(T{static_cast<uint16_t>(bits)}), next = widen(T{static_cast<uint16_t>(bits + 1)});
    if (!std::isfinite(value)) break;
    around(value);
    // Half of each before adding: the sum could overflow.
    if (std::isfinite(next)) around(value / 2 + next / 2);
  }
  const float largest = values[values.size() - 6];
  around(largest + (largest - std::nextafter(largest, 0.0f)));
  for (float past : {65519.0f, 65520.0f, 65521.0f, 65536.0f, 0x1.fefffep127f, 0x1.ffp127f, 0x1.fffffep127f})
    around(past);
  constexpr uint64_t kStep = 4099;
  for (uint64_t bits = 0; bits < uint64_t{1} << 32; bits += kStep) {
    values.push_back(float_from_bits(static_cast<uint32_t>(bits)));
  }
  for (uint32_t bits : {0x7f800000u, 0xff800000u, 0x7f800001u, 0x7fc00000u, 0x7fffffffu, 0xff800001u, 0xffffffffu, 1u,
                        0x007fffffu, 0x80000001u}) {
    values.push_back(float_from_bits(bits));
  }
  while (values.size() % 16 != 0) values.push_back(0);
  return values;
}

}  // namespace neuroada::testing
