// The AMX tile registers are released after every GEMM: code that runs next on the thread finds no
// configuration of ours, and no context switch saves their 8 KB.
#include <algorithm>
#include <array>

#include "run_cpu.h"

using namespace neuroada::testing;

namespace {

// sttilecfg stores all zeros if the registers are free.
bool tiles_are_free() {
  alignas(64) std::array<unsigned char, 64> shapes;
  asm volatile("sttilecfg %0" : "=m"(shapes));
  return std::all_of(shapes.begin(), shapes.end(), [](unsigned char byte) { return byte == 0; });
}

}  // namespace

int main() {
  const neuroada::cpu::Kernels* kernels = neuroada::cpu::kernels_for("amx_bf16");
  if (kernels == nullptr) return 77;  // no tiles here
  Random random(1);
  const Problem<neuroada::BFloat16> problem({40, 96, 64, 2}, random);
  run(problem, *kernels, sequential(1));
  CHECK(tiles_are_free(), "a product left its tile registers in use");
  return exit_status();
}
