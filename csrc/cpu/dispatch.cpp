// The copies of the kernels, one for each instruction set that was built; isa.h says which one runs.
#include <cstring>

#include "isa.h"
#include "kernels.h"

#define NEUROADA_ISA generic
#include "entry.h"
#undef NEUROADA_ISA
#ifdef NEUROADA_X86
#define NEUROADA_ISA avx2
#include "entry.h"
#undef NEUROADA_ISA
#define NEUROADA_ISA avx512
#include "entry.h"
#undef NEUROADA_ISA
#define NEUROADA_ISA avx512_bf16
#include "entry.h"
#undef NEUROADA_ISA
#endif
#ifdef NEUROADA_AMX
#define NEUROADA_ISA amx_bf16
#include "entry.h"
#undef NEUROADA_ISA
#endif

#define NEUROADA_KERNELS(isa)                                                                   \
  Kernels {                                                                                     \
    #isa, &isa::bypass_fwd, &isa::bypass_bwd_input, &isa::sddmm, &isa::merge, &isa::linear_fwd, \
        &isa::linear_bwd_input, &isa::largest, &isa::columns, &isa::bounds                      \
  }

namespace neuroada::cpu {
namespace {

#ifdef NEUROADA_X86
// bfloat16 is gathered directly, by sddmm_few(), if staging blocks of all columns costs more: where k d_out <=
// quarters / 4 (d_in + d_out). Only the shape decides, with the d_in of the full x.
template <int64_t quarters, bool prefetches>
void sddmm_of_pairs(const Sddmm& args, const Executor& executor) {
  const int64_t columns = std::max(args.d_in, args.whole_d_in) + args.d_out;
  if (args.dtype == DType::bf16 && 4 * args.k * args.d_out <= quarters * columns) {
    return avx512_bf16::sddmm_few(args, executor, prefetches);
  }
  avx512_bf16::sddmm(args, executor);
}

constexpr Kernels kernels_with_pairs() {
  Kernels kernels = NEUROADA_KERNELS(avx512_bf16);
  kernels.sddmm = &sddmm_of_pairs<4, true>;
  return kernels;
}
#endif

#ifdef NEUROADA_AMX
// AMX tiles multiply bfloat16; everything else, except the choice of the SDDMM, is as in avx512_bf16.
void linear_fwd_in_tiles(const LinearFwd& args, const Executor& executor) {
  (args.bypass.dtype == DType::bf16 ? amx_bf16::linear_fwd : avx512_bf16::linear_fwd)(args, executor);
}
void linear_bwd_input_in_tiles(const LinearBwdInput& args, const Executor& executor) {
  (args.bypass.dtype == DType::bf16 ? amx_bf16::linear_bwd_input : avx512_bf16::linear_bwd_input)(args, executor);
}

constexpr Kernels kernels_with_tiles() {
  Kernels kernels = kernels_with_pairs();
  kernels.isa = "amx_bf16";
  kernels.sddmm = &sddmm_of_pairs<7, false>;  // processors with tiles gather faster; prefetching was not measured there
  kernels.linear_fwd = &linear_fwd_in_tiles;
  kernels.linear_bwd_input = &linear_bwd_input_in_tiles;
  return kernels;
}
#endif

const Kernels kCopies[] = {
#ifdef NEUROADA_AMX
    kernels_with_tiles(),
#endif
#ifdef NEUROADA_X86
    kernels_with_pairs(),      NEUROADA_KERNELS(avx512), NEUROADA_KERNELS(avx2),
#endif
    NEUROADA_KERNELS(generic),
};

}  // namespace

const Kernels* kernels_for(const char* isa) {
  if (!isa_runs(isa)) return nullptr;
  for (const Kernels& kernels : kCopies) {
    if (std::strcmp(kernels.isa, isa) == 0) return &kernels;
  }
  return nullptr;
}

const Kernels& kernels() {
  static const Kernels& chosen = *kernels_for(chosen_isa());
  return chosen;
}

}  // namespace neuroada::cpu
