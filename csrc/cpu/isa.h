// Which instruction set's copy of the kernels runs: the widest that was built and that this processor supports, or a
// lower one that NEUROADA_CPU_ISA names. Refers to no kernel, so that the pybind11 module links none.
#pragma once

namespace neuroada::cpu {

// Whether the set with this name (generic, avx2, avx512, avx512_bf16, amx_bf16) was built and runs here.
bool isa_runs(const char* name);

// The name of the set whose kernels run; throws std::invalid_argument if NEUROADA_CPU_ISA names one that cannot.
const char* chosen_isa();

}  // namespace neuroada::cpu
