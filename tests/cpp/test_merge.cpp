// The four modes of the kernel on the chosen entries of W, in every dtype and instruction set.
#include "merge_checks.h"
#include "run_cpu.h"

using namespace neuroada;
using namespace neuroada::testing;

int main() {
  each_dtype([](auto element) {
    using T = decltype(element);
    each_isa([](const cpu::Kernels& kernels) {
      for (int64_t threads : {1, 5}) {
        check_merge_modes<T>(label<T>(kernels) + ", threads " + std::to_string(threads),
                             [&](const Problem<T>& p, MergeMode mode, Matrix<T>& weight, Matrix<T>& original) {
                               run_mode(p, mode, weight, original, kernels, sequential(threads));
                             });
      }
    });
  });
  return exit_status();
}
