// Runs simd_checks.cpp of one instruction set if the processor supports it. A separate source, since
// simd_checks.cpp is compiled for that set and the processor is checked by code that runs everywhere.
#include "check.h"
#include "cpu/kernels.h"

#define NEUROADA_NAME_(isa) #isa
#define NEUROADA_NAME(isa) NEUROADA_NAME_(isa)

namespace neuroada::cpu::NEUROADA_ISA {
void check_simd();
}

int main() {
  constexpr int kSkipped = 77;
  if (neuroada::cpu::kernels_for(NEUROADA_NAME(NEUROADA_ISA)) == nullptr) return kSkipped;
  neuroada::cpu::NEUROADA_ISA::check_simd();
  return neuroada::testing::exit_status();
}
