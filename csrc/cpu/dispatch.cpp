// Selects the instruction set whose copy of the kernels runs: the widest that was built and that this
// processor supports, or a lower one that NEUROADA_CPU_ISA names.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu_features.h"
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

struct Candidate {
  Kernels kernels;
  bool (*runs_here)();
};

const Candidate kCandidates[] = {
#ifdef NEUROADA_AMX
    {kernels_with_tiles(), &has_amx_bf16},
#endif
#ifdef NEUROADA_X86
    {kernels_with_pairs(), &has_avx512_bf16},
    {NEUROADA_KERNELS(avx512), &has_avx512},
    {NEUROADA_KERNELS(avx2), &has_avx2},
#endif
    {NEUROADA_KERNELS(generic), [] { return true; }},
};

const Kernels& choose() {
  const char* named = std::getenv("NEUROADA_CPU_ISA");
  if (named != nullptr && *named != '\0') {
    if (const Kernels* kernels = kernels_for(named)) return *kernels;
    throw std::invalid_argument(std::string("NEUROADA_CPU_ISA: '") + named +
                                "' was not built or does not run here; neuroada info lists what does");
  }
  for (const Candidate& candidate : kCandidates) {
    if (candidate.runs_here()) return candidate.kernels;
  }
  return kCandidates[0].kernels;  // not reached: the generic one runs everywhere
}

}  // namespace

const Kernels* kernels_for(const char* isa) {
  for (const Candidate& candidate : kCandidates) {
    if (std::strcmp(candidate.kernels.isa, isa) == 0 && candidate.runs_here()) return &candidate.kernels;
  }
  return nullptr;
}

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace neuroada::cpu
