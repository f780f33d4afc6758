// Runs the CPU kernels, except columns() and bounds(), once on a small case: see count_instructions.py.
//
//   count_instructions compiler            # what compiled it
//   count_instructions avx2 float32        # the kernels of an instruction set in a dtype
#include <cstdio>
#include <cstring>

#include "run_cpu.h"

namespace neuroada::testing {
namespace {

// The tokens are not a multiple of a vector, and no dimension is one of a tile, so that remainder loops are counted as
// well; d_in and d_out are multiples of 8 floats.
constexpr Case kCase{67, 200, 136, 8, IndexKind::distinct, true};

template <class T>
void run_largest(const Problem<T>& p, const cpu::Kernels& kernels, const cpu::Executor& executor) {
  Matrix<int32_t> index(p.shape.d_out, p.shape.k);
  kernels.largest({dtype_of<T>(), cpu::Ranking::magnitude, p.shape.d_out, p.shape.d_in, p.shape.k, p.weight.data(),
                   p.weight.stride(), index.data()},
                  executor);
}

int count(const char* isa, const char* dtype) {
  const cpu::Kernels* kernels = cpu::kernels_for(isa);
  if (kernels == nullptr) {
    std::printf("%s was not built or does not run here\n", isa);
    return 77;
  }
  bool known = false;
  each_dtype([&](auto element) {
    using T = decltype(element);
    if (std::strcmp(dtype_name<T>(), dtype) != 0) return;
    known = true;
    Random random(1);
    const Problem<T> problem(kCase, random);
    run(problem, *kernels, sequential(1));
    run_largest(problem, *kernels, sequential(1));
  });
  if (!known) std::printf("%s is no dtype\n", dtype);
  return known ? 0 : 2;
}

}  // namespace
}  // namespace neuroada::testing

int main(int argc, char** argv) {
  if (argc == 3) return neuroada::testing::count(argv[1], argv[2]);
  std::printf("%s\n", NEUROADA_COMPILER);
  return 0;
}
