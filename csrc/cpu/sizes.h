// Whole numbers of pieces. In the instruction set's namespace, as all that is inline: of several copies of a function
// the linker keeps one, which might be compiled for a processor wider than the one at hand.
#pragma once

#include <cstdint>

namespace neuroada::cpu::NEUROADA_ISA {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t value, int64_t step) { return ceil_div(value, step) * step; }

}  // namespace neuroada::cpu::NEUROADA_ISA
