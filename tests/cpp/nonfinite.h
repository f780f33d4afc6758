// Problems with NaN and Inf that a kernel could hide or spread.
#pragma once

#include <limits>

#include "problem.h"

namespace neuroada::testing {

inline constexpr float kInf = std::numeric_limits<float>::infinity(), kNaN = std::numeric_limits<float>::quiet_NaN();

template <class T>
void put(Matrix<T>& matrix, int64_t row, int64_t column, float value) {
  narrow(accumulate_t<T>{value}, matrix(row, column));
}

// 37 tokens and 21 neurons: the last block of each kernel is a partial one.
template <class T>
Problem<T> ragged_problem() {
  Random random(1);
  return Problem<T>({37, 19, 21, 4, IndexKind::ragged, true, Base::separate, 2}, random);
}

template <class T>
Problem<T> with_values_of(Matrix<T> Problem<T>::* input, float value) {
  Problem<T> problem = ragged_problem<T>();
  Matrix<T>& matrix = problem.*input;
  put(matrix, 0, 0, value);
  put(matrix, matrix.rows() / 2, 3, value);
  put(matrix, matrix.rows() - 1, matrix.columns() - 1, value);
  return problem;
}

template <class T>
Problem<T> with_deltas(float value) {
  Problem<T> problem = ragged_problem<T>();
  problem.each_connection([&](int64_t j, int64_t s, int64_t) {
    if (j % 5 == 0 && s == j % 4) problem.delta(j, s) = value;
  });
  return problem;
}

// 0 * Inf is NaN: a kernel that skips zeros would hide it.
template <class T>
Problem<T> where_zeros_meet_infinity() {
  Problem<T> problem = ragged_problem<T>();
  for (int64_t t = 0; t < problem.shape.tokens; ++t) {
    put(problem.x, t, 2, kInf);
    put(problem.grad, t, 3, t % 2 ? 0.0f : kInf);
  }
  problem.each_connection([&](int64_t j, int64_t s, int64_t) {
    if (j % 2 == 0) problem.delta(j, s) = 0;
  });
  return problem;
}

// A slot of -1 read as column 0 with a delta of zero would make NaN of an infinite column 0.
template <class T>
Problem<T> where_no_slot_reads_column_0() {
  Random random(2);
  Problem<T> problem({17, 5, 20, 2, IndexKind::empty_rows}, random);
  for (int64_t j = 0; j < problem.shape.d_out; ++j) {
    for (int64_t s = 0; s < problem.shape.k; ++s) {
      if (problem.index(j, s) <= 0) problem.index(j, s) = -1, problem.delta(j, s) = 0;
    }
  }
  for (int64_t t = 0; t < problem.shape.tokens; ++t) put(problem.x, t, 0, t % 2 ? kInf : kNaN);
  return problem;
}

// The largest finite value of a 16-bit dtype times deltas above 1 in magnitude. With one token and zero
// weights, no partial sum overflows.
template <class T>
Problem<T> that_overflows() {
  Random random(3);
  Problem<T> problem({1, 9, 20, 1}, random);
  const float largest = dtype_of<T>() == DType::f16 ? 65504.0f : 0x1.fep127f;
  for (int64_t column = 0; column < 9; ++column) put(problem.x, 0, column, largest);
  for (int64_t j = 0; j < 20; ++j) {
    for (int64_t column = 0; column < 9; ++column) put(problem.weight, j, column, 0);
  }
  for (int64_t j = 0; j < 20; ++j) problem.delta(j, 0) = j % 2 ? 1.75f : -1.25f;
  return problem;
}

// Calls check(problem, name) for every such problem of one dtype.
template <class T, class F>
void each_nonfinite_problem(F&& check) {
  for (float value : {kInf, -kInf, kNaN}) {
    check(with_values_of(&Problem<T>::x, value), "x");
    check(with_values_of(&Problem<T>::grad, value), "grad");
    check(with_values_of(&Problem<T>::base, value), "base");
    check(with_values_of(&Problem<T>::weight, value), "weight");
    check(with_deltas<T>(value), "delta");
  }
  check(where_zeros_meet_infinity<T>(), "zeros");
  check(where_no_slot_reads_column_0<T>(), "column 0");
  if constexpr (sizeof(T) == 2) check(that_overflows<T>(), "overflow");
}

}  // namespace neuroada::testing
