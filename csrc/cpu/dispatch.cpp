// Which instruction set's copy of the kernels runs: the widest that was built and that this
// processor has, or a lower one that NEUROADA_CPU_ISA names.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu_features.h"
#include "kernels.h"

#define NEUROADA_DECLARE(isa)                                    \
  namespace neuroada::cpu::isa {                                 \
  void bypass_fwd(const BypassFwd&, const Executor&);            \
  void bypass_bwd_input(const BypassBwdInput&, const Executor&); \
  void sddmm(const Sddmm&, const Executor&);                     \
  void merge(const Merge&, const Executor&);                     \
  }
#define NEUROADA_KERNELS(isa) \
  Kernels { #isa, &isa::bypass_fwd, &isa::bypass_bwd_input, &isa::sddmm, &isa::merge }

NEUROADA_DECLARE(generic)
#ifdef NEUROADA_X86
NEUROADA_DECLARE(avx2)
NEUROADA_DECLARE(avx512)
#endif

namespace neuroada::cpu {
namespace {

struct Candidate {
  Kernels kernels;
  bool (*runs_here)();
};

const Candidate kCandidates[] = {
#ifdef NEUROADA_X86
    {NEUROADA_KERNELS(avx512), &has_avx512},
    {NEUROADA_KERNELS(avx2), &has_avx2},
#endif
    {NEUROADA_KERNELS(generic), [] { return true; }},
};

const Kernels& choose() {
  const char* named = std::getenv("NEUROADA_CPU_ISA");
  if (named != nullptr) {
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
