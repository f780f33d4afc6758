// The entry points of one instruction set's copy of the kernels. Only avx512_bf16 has sddmm_few(), and amx_bf16 has
// only linear_fwd() and linear_bwd_input(). No include guard: dispatch.cpp includes it once per instruction set.

#include "kernels.h"

namespace neuroada::cpu::NEUROADA_ISA {

void bypass_fwd(const BypassFwd&, const Executor&);
void bypass_bwd_input(const BypassBwdInput&, const Executor&);
void sddmm(const Sddmm&, const Executor&);
void sddmm_few(const Sddmm&, const Executor&, bool prefetches);
void merge(const Merge&, const Executor&);
void linear_fwd(const LinearFwd&, const Executor&);
void linear_bwd_input(const LinearBwdInput&, const Executor&);
void largest(const Largest&, const Executor&);
void columns(const Columns&, const Executor&);
Bounds bounds(const int32_t* values, int64_t count);

}  // namespace neuroada::cpu::NEUROADA_ISA
