// NaN and Inf come out exactly where the formulas put them, and nowhere else.
#include <limits>

#include "problem.h"

using namespace neuroada::testing;

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();

template <class T>
void put(Matrix<T>& matrix, int64_t row, int64_t column, float value) {
  neuroada::narrow(neuroada::accumulate_t<T>{value}, matrix(row, column));
}

template <class T>
void check_against_formula(const Problem<T>& problem, const char* what) {
  const Outputs<double> expected = reference(problem);
  each_isa([&](const neuroada::cpu::Kernels& kernels) {
    check_outputs(run(problem, kernels, in_turn(2)), expected, label<T>(kernels) + ", " + what);
  });
}

// 37 tokens and 21 neurons: the last block of each instruction set is a partial one.
template <class T>
Problem<T> ragged_problem() {
  Random random(1);
  return Problem<T>({37, 19, 21, 4, IndexKind::ragged, true, Base::separate, 2}, random);
}

template <class T>
void nonfinite_values_of(Matrix<T> Problem<T>::* input, const char* name) {
  for (float value : {kInf, -kInf, kNaN}) {
    Problem<T> problem = ragged_problem<T>();
    Matrix<T>& matrix = problem.*input;
    put(matrix, 0, 0, value);
    put(matrix, matrix.rows() / 2, 3, value);
    put(matrix, matrix.rows() - 1, matrix.columns() - 1, value);
    check_against_formula(problem, name);
  }
}

template <class T>
void nonfinite_deltas() {
  for (float value : {kInf, -kInf, kNaN}) {
    Problem<T> problem = ragged_problem<T>();
    problem.each_connection([&](int64_t j, int64_t s, int64_t) {
      if (j % 5 == 0 && s == j % 4) problem.delta(j, s) = value;
    });
    check_against_formula(problem, "delta");
  }
}

// 0 * Inf is NaN: a kernel that skips what is zero would hide it.
template <class T>
void zeros_meet_infinity() {
  Problem<T> problem = ragged_problem<T>();
  for (int64_t t = 0; t < problem.shape.tokens; ++t) {
    put(problem.x, t, 2, kInf);
    put(problem.grad, t, 3, t % 2 ? 0.0f : kInf);
  }
  problem.each_connection([&](int64_t j, int64_t s, int64_t) {
    if (j % 2 == 0) problem.delta(j, s) = 0;
  });
  check_against_formula(problem, "zeros");
}

// A slot of -1 read as column 0 with a delta of zero would make NaN of an infinite column 0.
template <class T>
void empty_slots_read_no_column() {
  Random random(2);
  Problem<T> problem({17, 5, 20, 2, IndexKind::empty_rows}, random);
  for (int64_t j = 0; j < problem.shape.d_out; ++j) {
    for (int64_t s = 0; s < problem.shape.k; ++s) {
      if (problem.index(j, s) <= 0) problem.index(j, s) = -1, problem.delta(j, s) = 0;
    }
  }
  for (int64_t t = 0; t < problem.shape.tokens; ++t) put(problem.x, t, 0, t % 2 ? kInf : kNaN);
  each_isa([&](const neuroada::cpu::Kernels& kernels) {
    const Outputs<T> outputs = run(problem, kernels, in_turn(1));
    for (int64_t j = 0; j < problem.shape.d_out; ++j) {
      for (int64_t t = 0; t < problem.shape.tokens; ++t) {
        CHECK(std::isfinite(neuroada::widen(outputs.out(t, j))), label<T>(kernels) + ": out has column 0 in it");
      }
      for (int64_t s = 0; s < problem.shape.k; ++s) {
        CHECK(std::isfinite(outputs.grad_delta(j, s)), label<T>(kernels) + ": sddmm has column 0 in it");
      }
    }
  });
  check_against_formula(problem, "column 0");
}

// The largest finite value of a 16-bit dtype times more than 1. One token, and weights of zero: no
// partial sum overflows.
template <class T>
void overflow_becomes_infinity() {
  Random random(3);
  Problem<T> problem({1, 9, 20, 1}, random);
  const float largest = dtype_of<T>() == neuroada::DType::f16 ? 65504.0f : 0x1.fep127f;
  for (int64_t column = 0; column < 9; ++column) put(problem.x, 0, column, largest);
  for (int64_t j = 0; j < 20; ++j) {
    for (int64_t column = 0; column < 9; ++column) put(problem.weight, j, column, 0);
  }
  for (int64_t j = 0; j < 20; ++j) problem.delta(j, 0) = j % 2 ? 1.75f : -1.25f;
  check_against_formula(problem, "overflow");
}

}  // namespace

int main() {
  each_dtype([](auto element) {
    using T = decltype(element);
    nonfinite_values_of<T>(&Problem<T>::x, "x");
    nonfinite_values_of<T>(&Problem<T>::grad, "grad");
    nonfinite_values_of<T>(&Problem<T>::base, "base");
    nonfinite_values_of<T>(&Problem<T>::weight, "weight");
    nonfinite_deltas<T>();
    zeros_meet_infinity<T>();
    empty_slots_read_no_column<T>();
    if constexpr (sizeof(T) == 2) overflow_becomes_infinity<T>();
  });
  return exit_status();
}
