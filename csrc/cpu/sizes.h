// Rounding up. In the instruction set's namespace, as all inline functions: of several copies of a function the linker
// keeps one, which might be compiled for an instruction set that the processor lacks.
#pragma once

#include <cstdint>

namespace neuroada::cpu::NEUROADA_ISA {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t value, int64_t step) { return ceil_div(value, step) * step; }

}  // namespace neuroada::cpu::NEUROADA_ISA
