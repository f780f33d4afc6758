// A matrix, some of its columns, and the expected copy of them.
#pragma once

#include <utility>
#include <vector>

#include "problem.h"

namespace neuroada::testing {

// x has random bits, including NaNs of every kind. A column that x lacks is zero in the copy.
template <class T>
struct ColumnsProblem {
  std::vector<int32_t> columns;
  Matrix<T> x, expected;
  int64_t lead;  // of the copy

  ColumnsProblem(int64_t tokens, int64_t d_in, std::vector<int32_t> chosen, Random& random)
      : columns(std::move(chosen)),
        x(tokens, d_in, random.below(3), random.below(2)),
        expected(tokens, count()),
        lead(random.below(2)) {
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t c = 0; c < d_in; ++c) {
        const uint64_t bits = random.next();
        std::memcpy(&x(t, c), &bits, sizeof(T));
      }
      for (int64_t i = 0; i < count(); ++i) {
        const int32_t column = columns[static_cast<size_t>(i)];
        expected(t, i) = column >= 0 && column < d_in ? x(t, column) : T{};
      }
    }
  }

  int64_t count() const { return static_cast<int64_t>(columns.size()); }

  // Whether copy(out), which fills an uninitialised matrix, writes what is expected and nothing else.
  template <class Copy>
  bool is_made_by(Copy&& copy) const {
    Matrix<T> out(x.rows(), count(), 0, lead);
    copy(out);
    bool same = out.gaps_untouched();
    for (int64_t t = 0; t < x.rows() && count() > 0; ++t) {
      same &= std::memcmp(&out(t, 0), &expected(t, 0), static_cast<size_t>(count()) * sizeof(T)) == 0;
    }
    return same;
  }
};

// Some columns of d_in: ascending, as the planner returns them, or in any order, with repetitions.
inline std::vector<int32_t> draw_columns(int64_t d_in, Random& random) {
  std::vector<int32_t> columns;
  const int64_t share = 1 + random.below(4);
  if (random.one_in(4)) {
    for (int64_t i = random.below(2 * d_in + 1); i > 0; --i)
      columns.push_back(static_cast<int32_t>(random.below(d_in)));
  } else {
    for (int64_t c = 0; c < d_in; ++c) {
      if (random.below(4) < share) columns.push_back(static_cast<int32_t>(c));
    }
  }
  return columns;
}

}  // namespace neuroada::testing
