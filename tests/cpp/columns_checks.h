// Columns of a matrix, copied one value at a time.
#pragma once

#include <string>
#include <vector>

#include "run_cpu.h"

namespace neuroada::testing {

// What stands in x is any bits at all, NaNs of every kind among them.
template <class T>
void check_columns(int64_t tokens, int64_t d_in, const std::vector<int32_t>& columns, int64_t threads, Random& random,
                   const std::string& where) {
  const auto count = static_cast<int64_t>(columns.size());
  Matrix<T> x(tokens, d_in, random.below(3), random.below(2)), expected(tokens, count);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t c = 0; c < d_in; ++c) {
      const uint64_t bits = random.next();
      std::memcpy(&x(t, c), &bits, sizeof(T));
    }
    for (int64_t i = 0; i < count; ++i) expected(t, i) = x(t, columns[static_cast<size_t>(i)]);
  }
  each_isa([&](const cpu::Kernels& kernels) {
    Matrix<T> out(tokens, count);
    kernels.columns({dtype_of<T>(), tokens, d_in, count, x.data(), x.stride(), columns.data(), out.data()},
                    in_turn(threads));
    CHECK(out.same_bits(expected), label<T>(kernels) + ", columns, " + where);
  });
}

// Some columns of d_in, rising as the planner gives them, or in any order, and then one more than once.
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
