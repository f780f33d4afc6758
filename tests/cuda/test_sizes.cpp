// The sizes of a Llama-3-8B's linears with the threads, SMs and shared memory of an H200. All other tests have small
// problems and a small device, which are partitioned alike.
#include "run_cuda.h"

using namespace neuroada::testing;
using neuroada::BFloat16;
using neuroada::cuda::Device;

namespace {

constexpr Device kH200{232448, 132, 512, 32 << 20, true};

[[maybe_unused]] void check_sizes(const Case& c) {
  Random random(1);
  Problem<BFloat16> problem(c, random);
  for (int64_t j = 0; j < c.d_out; ++j) {
    for (int64_t s = 0; s < c.k; ++s) {  // to the bits of a packed delta
      BFloat16 narrow;
      neuroada::narrow(problem.delta(j, s), narrow);
      problem.delta(j, s) = neuroada::widen(narrow);
    }
  }
  const Outputs<BFloat16> found = run(problem, kH200);
  check_outputs(found, reference(problem), c.name());
  Device two = kH200;
  two.two_tiles = true;
  Outputs<BFloat16> again = make_outputs(problem);
  run_bypass_fwd(problem, again, two);
  CHECK(again.out.same_bits(found.out), c.name() + ", two tiles: other bits of out");
  CHECK(run_sddmm(problem, two).same_bits(found.grad_delta), c.name() + ", two tiles: other bits of grad_delta");
}

}  // namespace

int main() {
#ifndef __SANITIZE_THREAD__  // which takes minutes
  check_sizes({12, 4096, 4096, 8});
  check_sizes({12, 4096, 1024, 20});
  check_sizes({12, 4096, 14336, 8});
  check_sizes({12, 14336, 4096, 1});
#endif
  return exit_status();
}
