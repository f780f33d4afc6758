// NaN and Inf come out exactly where the formulas put them, and nowhere else.
#include "nonfinite.h"
#include "run_cpu.h"

using namespace neuroada::testing;

int main() {
  each_dtype([](auto element) {
    using T = decltype(element);
    each_nonfinite_problem<T>([](const Problem<T>& problem, const char* what) {
      const Outputs<double> expected = reference(problem);
      each_isa([&](const neuroada::cpu::Kernels& kernels) {
        check_outputs(run(problem, kernels, sequential(2)), expected, label<T>(kernels) + ", " + what);
      });
    });
  });
  return exit_status();
}
