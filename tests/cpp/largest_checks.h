// Compares the columns of a row's k best scores with a sort of the row.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "run_cpu.h"

namespace neuroada::testing {

// The score as a double, highest first; a stable sort leaves ties in the order of their columns.
template <class T>
double score_of(T value, cpu::Ranking by) {
  const double score = static_cast<double>(widen(value));
  if (by == cpu::Ranking::value) return score;
  return by == cpu::Ranking::magnitude ? std::fabs(score) : -std::fabs(score);
}

template <class T>
std::vector<int32_t> sorted_columns(const Matrix<T>& scores, int64_t row, int64_t k, cpu::Ranking by) {
  std::vector<int32_t> columns(static_cast<size_t>(scores.columns()));
  std::iota(columns.begin(), columns.end(), 0);
  for (int32_t c : columns) {
    if (std::isnan(score_of(scores(row, c), by))) return std::vector<int32_t>(static_cast<size_t>(k), -1);
  }
  std::stable_sort(columns.begin(), columns.end(),
                   [&](int32_t a, int32_t b) { return score_of(scores(row, a), by) > score_of(scores(row, b), by); });
  columns.resize(static_cast<size_t>(k));
  std::sort(columns.begin(), columns.end());
  return columns;
}

template <class T>
void check_largest(const Matrix<T>& scores, int64_t k, int64_t threads, const std::string& where) {
  const int64_t rows = scores.rows(), columns = scores.columns();
  each_isa([&](const cpu::Kernels& kernels) {
    for (cpu::Ranking by : {cpu::Ranking::value, cpu::Ranking::magnitude, cpu::Ranking::smallest}) {
      std::vector<int32_t> index(static_cast<size_t>(rows * k), -7);
      kernels.largest({dtype_of<T>(), by, rows, columns, k, scores.data(), scores.stride(), index.data()},
                      sequential(threads));
      for (int64_t row = 0; row < rows; ++row) {
        const std::vector<int32_t> found(index.begin() + row * k, index.begin() + (row + 1) * k);
        CHECK(found == sorted_columns(scores, row, k, by),
              label<T>(kernels) + ", " + where + ", k " + std::to_string(k) + ", ranked by " +
                  std::to_string(static_cast<int>(by)) + ", row " + std::to_string(row));
      }
    }
  });
}

// Few distinct values, so that many are equal, including zeros of both signs and infinities; random
// bits; or ascending and descending rows.
template <class T>
Matrix<T> draw_scores(int64_t rows, int64_t columns, Random& random) {
  Matrix<T> scores(rows, columns, random.below(3), random.below(2));
  const int64_t kind = random.below(4);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < columns; ++c) {
      const double values[] = {0.0, -0.0, 1.0, -1.0, 2.5, INFINITY, -INFINITY};
      double value = values[random.below(kind == 0 ? 3 : 7)];
      if (kind == 2) value = static_cast<double>(row % 2 ? columns - c : c);
      narrow(static_cast<accumulate_t<T>>(value), scores(row, c));
      if (kind == 3) {
        const uint64_t bits = random.next() & ~(uint64_t{1} << (8 * sizeof(T) - 2));  // no NaN
        std::memcpy(&scores(row, c), &bits, sizeof(T));
        if (random.one_in(5000)) std::memset(&scores(row, c), 0xff, sizeof(T));  // except these
      }
    }
  }
  return scores;
}

}  // namespace neuroada::testing
