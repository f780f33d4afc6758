// NaN and Inf come out of the CUDA kernels exactly where the formulas put them, and nowhere else.
#include "nonfinite.h"
#include "run_cuda.h"

using namespace neuroada::testing;

int main() {
  constexpr TestDevice kDevices[] = {{"roomy", {64 << 10, 2, 32, 1 << 20}}, {"tiled", {9 * kQuad, 2, 32, 1 << 20}}};
  each_cuda_dtype([&](auto element) {
    using T = decltype(element);
    each_nonfinite_problem<T>([&](const Problem<T>& problem, const char* what) {
      for (const TestDevice& on : kDevices) {
        const std::string where = std::string(dtype_name<T>()) + " on " + on.name + ", " + what;
        check_outputs(run(problem, on.device), reference(problem), where);
      }
    });
  });
  return exit_status();
}
