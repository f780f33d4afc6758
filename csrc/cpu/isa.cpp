#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cpu_features.h"

namespace neuroada::cpu {
namespace {

struct Isa {
  const char* name;
  bool (*runs_here)();
};

// The widest first.
const Isa kIsas[] = {
#ifdef NEUROADA_AMX
    {"amx_bf16", &has_amx_bf16},
#endif
#ifdef NEUROADA_X86
    {"avx512_bf16", &has_avx512_bf16}, {"avx512", &has_avx512}, {"avx2", &has_avx2},
#endif
    {"generic", [] { return true; }},
};

const char* choose() {
  const char* named = std::getenv("NEUROADA_CPU_ISA");
  const bool any = named == nullptr || *named == '\0';
  for (const Isa& isa : kIsas) {
    if ((any || std::strcmp(isa.name, named) == 0) && isa.runs_here()) return isa.name;
  }
  throw std::invalid_argument(std::string("NEUROADA_CPU_ISA: '") + named +
                              "' was not built or does not run here; neuroada info lists what does");
}

}  // namespace

bool isa_runs(const char* name) {
  for (const Isa& isa : kIsas) {
    if (std::strcmp(isa.name, name) == 0) return isa.runs_here();
  }
  return false;
}

const char* chosen_isa() {
  static const char* const chosen = choose();
  return chosen;
}

}  // namespace neuroada::cpu
