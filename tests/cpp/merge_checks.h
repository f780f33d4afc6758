// Checks what gather, patch and restore write, that patching twice changes nothing, and that restoring
// recovers every bit. run(problem, mode, weight, original) is the kernel under test.
#pragma once

#include "neuroada/merge_mode.h"
#include "problem.h"

namespace neuroada::testing {

// The problem's values are on the grid, or its weight has arbitrary bits.
template <class T, class Run>
void check_restored(const Problem<T>& problem, const std::string& where, Run&& run) {
  const Case& c = problem.shape;
  for (MergeMode first : {MergeMode::gather, MergeMode::merge}) {
    Matrix<T> weight = problem.weight, original(c.d_out, c.k, 0, c.lead);
    run(problem, first, weight, original);
    run(problem, MergeMode::patch, weight, original);
    run(problem, MergeMode::restore, weight, original);
    CHECK(weight.same_bits(problem.weight), where + ": restoring does not bring back the weight");
  }
}

template <class T, class Run>
void check_patched(const Problem<T>& problem, const std::string& where, Run&& run) {
  const Case& c = problem.shape;
  const Outputs<double> expected = reference(problem);
  Matrix<T> weight = problem.weight, original(c.d_out, c.k, 0, c.lead);

  run(problem, MergeMode::gather, weight, original);
  check_rounded(original, expected.original, where + ": gathered");
  CHECK(weight.same_bits(problem.weight), where + ": gathering changed the weight");

  for (const char* turn : {"patched", "patched again"}) {
    const Matrix<T> kept = original;
    run(problem, MergeMode::patch, weight, original);
    check_rounded(weight, expected.weight, where + ": " + turn);
    CHECK(original.same_bits(kept), where + ": patching changed the originals");
  }
  check_restored(problem, where, run);
}

// Random bits, so that any pattern may occur, including NaN payloads and negative zeros.
template <class T>
void fill_with_any_bits(Matrix<T>& matrix, Random& random) {
  for (int64_t row = 0; row < matrix.rows(); ++row) {
    for (int64_t column = 0; column < matrix.columns(); ++column) {
      const uint64_t bits = random.next();
      std::memcpy(&matrix(row, column), &bits, sizeof(T));
    }
  }
}

// Both checks, over shapes that a kernel could split wrongly.
template <class T, class Run>
void check_merge_modes(const std::string& where, Run&& run) {
  for (const Case& c : {Case{1, 13, 40, 3, IndexKind::ragged, false, Base::none, 3, Values::grid, 1},
                        Case{1, 64, 33, 8}, Case{1, 5, 70, 5, IndexKind::one_column, false, Base::none, 1},
                        Case{1, 21, 31, 2, IndexKind::empty_rows}, Case{1, 7, 0, 3}, Case{1, 7, 3, 0}}) {
    Random random(1);
    Problem<T> problem(c, random);
    check_patched(problem, where + ", " + c.name(), run);
    fill_with_any_bits(problem.weight, random);
    check_restored(problem, where + ", any bits, " + c.name(), run);
  }
}

}  // namespace neuroada::testing
