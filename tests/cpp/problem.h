// Inputs of all kernels for one shape, the kernels' outputs, and those of the formulas.
//
// Values::grid draws multiples of a power of two, so few and so coarse that every partial sum is
// exact in the accumulate type, whatever its order. The only rounding left is the one to the output's
// dtype, and outputs are compared with the formula for equality, with no tolerance.
#pragma once

#include <cmath>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "matrix.h"
#include "nearest.h"
#include "neuroada/planner.h"

namespace neuroada::testing {

enum class IndexKind { distinct, ragged, empty_rows, one_column };
enum class Base { none, separate, out };
enum class Values { grid, real };

// Grid sums are exact up to 131 products with delta and 2100 of grad and x for any signs, and far
// beyond with random signs.
struct Case {
  int64_t tokens, d_in, d_out, k;
  IndexKind index = IndexKind::distinct;
  bool bias = false;
  Base base = Base::none;
  int64_t gap = 0;  // elements between rows
  Values values = Values::grid;
  int64_t lead = 0;  // elements before the first row, so that it is not aligned

  std::string name() const {
    return "tokens " + std::to_string(tokens) + ", d_in " + std::to_string(d_in) + ", d_out " + std::to_string(d_out) +
           ", k " + std::to_string(k) + ", index kind " + std::to_string(static_cast<int>(index)) + ", bias " +
           std::to_string(bias) + ", base " + std::to_string(static_cast<int>(base)) + ", gap " + std::to_string(gap) +
           ", lead " + std::to_string(lead);
  }
};

template <class T>
DType dtype_of();
template <>
inline DType dtype_of<float>() {
  return DType::f32;
}
template <>
inline DType dtype_of<double>() {
  return DType::f64;
}
template <>
inline DType dtype_of<BFloat16>() {
  return DType::bf16;
}
template <>
inline DType dtype_of<Half>() {
  return DType::f16;
}

// An integer of `bits` bits and a sign over 2^bits, or a real number in (-1, 1).
inline double draw(Values values, int bits, Random& random) {
  if (values == Values::real) bits = 53;
  const int64_t limit = int64_t{1} << bits;
  return std::ldexp(static_cast<double>(random.below(2 * limit - 1) - (limit - 1)), -bits);
}

template <class T>
void fill(Matrix<T>& matrix, Values values, int bits, Random& random) {
  for (int64_t row = 0; row < matrix.rows(); ++row) {
    for (int64_t column = 0; column < matrix.columns(); ++column) {
      narrow(static_cast<accumulate_t<T>>(draw(values, bits, random)), matrix(row, column));
    }
  }
}

// Distinct columns in each row, -1 in slots without one and wherever k exceeds d_in.
inline Matrix<int32_t> make_index(const Case& c, Random& random) {
  Matrix<int32_t> index(c.d_out, c.k, 0, c.lead);
  std::vector<int32_t> columns(static_cast<size_t>(c.d_in));
  for (int64_t i = 0; i < c.d_in; ++i) columns[i] = static_cast<int32_t>(i);
  for (int64_t j = 0; j < c.d_out; ++j) {
    const bool empty = c.index == IndexKind::empty_rows && (j % 2 == 0 || c.d_out < 3);
    for (int64_t s = 0; s < c.k; ++s) {
      index(j, s) = -1;
      if (s >= c.d_in || empty) continue;
      if (c.index != IndexKind::one_column) std::swap(columns[s], columns[s + random.below(c.d_in - s)]);
      if (c.index != IndexKind::ragged || !random.one_in(4)) index(j, s) = columns[s];
    }
  }
  return index;
}

template <class T>
struct Problem {
  using A = accumulate_t<T>;
  static constexpr bool is_double = sizeof(A) == sizeof(double);
  static constexpr int kBits = is_double ? 20 : 5, kDeltaBits = is_double ? 24 : 12;

  Case shape;
  Matrix<T> x, grad, base, bias, weight;
  Matrix<int32_t> index;
  Matrix<A> delta;  // NaN where a slot has no connection: the formulas never read it

  Problem(const Case& c, Random& random)
      : shape(c),
        x(c.tokens, c.d_in, c.gap, c.lead),
        grad(c.tokens, c.d_out, c.gap, c.lead),
        base(c.tokens, c.d_out, c.gap, c.lead),
        bias(1, c.d_out, 0, c.lead),
        weight(c.d_out, c.d_in, c.gap, c.lead),
        index(make_index(c, random)),
        delta(c.d_out, c.k, 0, c.lead) {
    for (Matrix<T>* matrix : {&x, &grad, &base, &bias, &weight}) fill(*matrix, c.values, kBits, random);
    fill(delta, c.values, kDeltaBits, random);
    for (int64_t j = 0; j < c.d_out; ++j) {
      for (int64_t s = 0; s < c.k; ++s) {
        if (index(j, s) < 0) delta(j, s) = std::numeric_limits<A>::quiet_NaN();
      }
    }
  }

  // Calls f(j, s, column) for every connection.
  template <class F>
  void each_connection(F&& f) const {
    for (int64_t j = 0; j < shape.d_out; ++j) {
      for (int64_t s = 0; s < shape.k; ++s) {
        if (index(j, s) >= 0) f(j, s, index(j, s));
      }
    }
  }
};

template <class T>
struct Outputs {
  Matrix<T> out, grad_x;
  Matrix<accumulate_t<T>> grad_delta;
  Matrix<T> weight, original;
  // Outputs of the kernels fused with the GEMM, if there are any.
  bool has_linear = false;
  Matrix<T> linear{0, 0}, linear_grad_x{0, 0};

  bool same_bits(const Outputs& other) const {
    return out.same_bits(other.out) && grad_x.same_bits(other.grad_x) && grad_delta.same_bits(other.grad_delta) &&
           weight.same_bits(other.weight) && original.same_bits(other.original) && linear.same_bits(other.linear) &&
           linear_grad_x.same_bits(other.linear_grad_x);
  }
};

inline std::vector<int32_t> make_plan(const Matrix<int32_t>& index, int64_t d_in) {
  std::string error;
  const int64_t live = check_index(index.data(), index.rows(), index.columns(), d_in, error);
  CHECK(live >= 0, "a valid index was refused: " + error);
  std::vector<int32_t> plan(static_cast<size_t>(plan_size(d_in, live)), -1);
  plan_index(index.data(), index.rows(), index.columns(), d_in, plan.data());
  return plan;
}

// The outputs before a run: poisoned, except for values that the kernels also read there.
template <class T>
Outputs<T> make_outputs(const Problem<T>& p) {
  const Case& c = p.shape;
  return {c.base == Base::out ? p.base : Matrix<T>(c.tokens, c.d_out, c.gap + 1, c.lead),
          Matrix<T>(c.tokens, c.d_in, c.gap, c.lead), Matrix<accumulate_t<T>>(c.d_out, c.k, 0, c.lead), p.weight,
          Matrix<T>(c.d_out, c.k, 0, c.lead)};
}

// The base of bypass_fwd, or null.
template <class T>
const T* base_of(const Problem<T>& p, const Outputs<T>& r) {
  return p.shape.base == Base::none ? nullptr : p.shape.base == Base::out ? r.out.data() : p.base.data();
}

template <class T>
const T* bias_of(const Problem<T>& p) {
  return p.shape.bias ? p.bias.data() : nullptr;
}

inline Matrix<double> zeros(int64_t rows, int64_t columns) {
  Matrix<double> matrix(rows, columns);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) matrix(row, column) = 0;
  }
  return matrix;
}

// The formulas of kernels.h, in double.
template <class T>
Outputs<double> reference(const Problem<T>& p) {
  const Case& c = p.shape;
  Outputs<double> r{zeros(c.tokens, c.d_out), zeros(c.tokens, c.d_in), zeros(c.d_out, c.k),
                    zeros(c.d_out, c.d_in),   zeros(c.d_out, c.k),     true,
                    zeros(c.tokens, c.d_out), zeros(c.tokens, c.d_in)};
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t j = 0; j < c.d_out; ++j) {
      if (c.base != Base::none) r.out(t, j) += widen(p.base(t, j));
      if (c.bias) r.out(t, j) += widen(p.bias(0, j));
      if (c.bias) r.linear(t, j) += widen(p.bias(0, j));
      for (int64_t column = 0; column < c.d_in; ++column) {
        const double weight = widen(p.weight(j, column));
        r.linear(t, j) += widen(p.x(t, column)) * weight;
        r.linear_grad_x(t, column) += widen(p.grad(t, j)) * weight;
      }
    }
    p.each_connection([&](int64_t j, int64_t s, int64_t column) {
      const double delta = p.delta(j, s), x = widen(p.x(t, column)), grad = widen(p.grad(t, j));
      r.out(t, j) += delta * x;
      r.grad_x(t, column) += delta * grad;
      r.linear(t, j) += delta * x;
      r.linear_grad_x(t, column) += delta * grad;
      r.grad_delta(j, s) += grad * x;
    });
  }
  for (int64_t j = 0; j < c.d_out; ++j) {
    for (int64_t column = 0; column < c.d_in; ++column) r.weight(j, column) = widen(p.weight(j, column));
  }
  p.each_connection([&](int64_t j, int64_t s, int64_t column) {
    r.original(j, s) = r.weight(j, column);
    r.weight(j, column) += double{p.delta(j, s)};
  });
  return r;
}

template <class T>
void check_rounded(const Matrix<T>& actual, const Matrix<double>& expected, const std::string& what) {
  CHECK(actual.gaps_untouched(), what + ": wrote between rows");
  for (int64_t row = 0; row < actual.rows(); ++row) {
    for (int64_t column = 0; column < actual.columns(); ++column) {
      const double value = widen(actual(row, column)), rounded = nearest<T>(expected(row, column));
      if (same_value(value, rounded)) continue;
      CHECK(same_value(value, rounded), what + "[" + std::to_string(row) + ", " + std::to_string(column) + "] is " +
                                            std::to_string(value) + ", expected " + std::to_string(rounded));
      return;
    }
  }
}

template <class T>
void check_outputs(const Outputs<T>& actual, const Outputs<double>& expected, const std::string& where) {
  check_rounded(actual.out, expected.out, where + ": bypass_fwd");
  check_rounded(actual.grad_x, expected.grad_x, where + ": bypass_bwd_input");
  if (actual.has_linear) {
    check_rounded(actual.linear, expected.linear, where + ": linear_fwd");
    check_rounded(actual.linear_grad_x, expected.linear_grad_x, where + ": linear_bwd_input");
  }
  check_rounded(actual.grad_delta, expected.grad_delta, where + ": sddmm");
  check_rounded(actual.weight, expected.weight, where + ": merge, weight");
  check_rounded(actual.original, expected.original, where + ": merge, original");
}

template <class T>
const char* dtype_name() {
  const char* names[] = {"float32", "float64", "bfloat16", "float16"};
  return names[static_cast<int>(dtype_of<T>())];
}

}  // namespace neuroada::testing
