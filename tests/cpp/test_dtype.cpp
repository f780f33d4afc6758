// The scalar 16-bit conversions: exact when widening, to nearest with ties to even when narrowing.
#include <cmath>

#include "check.h"
#include "nearest.h"
#include "values16.h"

using namespace neuroada;
using namespace neuroada::testing;

namespace {

// The value of a 16-bit pattern from its fields.
double decode(uint16_t bits, int fraction_bits, int bias) {
  const int exponent = (bits & 0x7fff) >> fraction_bits, fraction = bits & ((1 << fraction_bits) - 1);
  const int special = 0x7fff >> fraction_bits;
  double magnitude =
      std::ldexp((exponent > 0) << fraction_bits | fraction, std::max(exponent, 1) - bias - fraction_bits);
  if (exponent == special) magnitude = fraction > 0 ? NAN : INFINITY;
  return bits & 0x8000 ? -magnitude : magnitude;
}
double decode(BFloat16 value) { return decode(value.bits, 7, 127); }
double decode(Half value) { return decode(value.bits, 10, 15); }

template <class T>
void every_pattern_widens_to_its_value_and_back(const char* name) {
  for (uint32_t bits = 0; bits <= 0xffff; ++bits) {
    const T value{static_cast<uint16_t>(bits)};
    const float wide = widen(value);
    T back;
    narrow(wide, back);
    const std::string which = std::string(name) + " " + std::to_string(bits);
    CHECK(same_value(wide, decode(value)), which);
    CHECK(std::signbit(wide) == (bits >= 0x8000), which + " has the wrong sign");
    CHECK(std::isnan(wide) ? std::isnan(decode(back)) : back.bits == bits, which + " does not return");
  }
}

template <class T>
void narrow_is_nearest_even(const char* name) {
  for (const float value : values_to_round<T>()) {
    T rounded;
    narrow(value, rounded);
    CHECK(same_value(decode(rounded), nearest<T>(value)),
          std::string(name) + " of float with bits " + std::to_string(float_bits(value)));
    CHECK(std::signbit(decode(rounded)) == std::signbit(value) || std::isnan(value),
          std::string(name) + " loses the sign of float with bits " + std::to_string(float_bits(value)));
  }
}

}  // namespace

int main() {
  every_pattern_widens_to_its_value_and_back<BFloat16>("bfloat16");
  every_pattern_widens_to_its_value_and_back<Half>("float16");
  narrow_is_nearest_even<BFloat16>("bfloat16");
  narrow_is_nearest_even<Half>("float16");
  return exit_status();
}
