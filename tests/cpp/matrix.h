// Row-major matrices that detect accesses out of bounds, and the random numbers to fill them with.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "guarded.h"
#include "neuroada/dtype.h"

namespace neuroada::testing {

// splitmix64: the same numbers with every standard library.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t count) { return static_cast<int64_t>(next() % static_cast<uint64_t>(count)); }
  bool one_in(int64_t count) { return below(count) == 0; }

 private:
  uint64_t state_;
};

// The allocation ends with the last element of the last row, so that accesses past it are detected
// (see guarded.h). All of it is initialised to NaN (0xff in each byte), including the gaps between the
// rows and the `lead` elements before the first row.
template <class T>
class Matrix {
 public:
  Matrix(int64_t rows, int64_t columns, int64_t gap = 0, int64_t lead = 0)
      : rows_(rows),
        columns_(columns),
        stride_(columns + gap),
        lead_(lead),
        values_(lead + (rows > 0 ? (rows - 1) * stride_ + columns : 0)) {
    if (!values_.empty()) std::memset(values_.data(), 0xff, bytes());
  }

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t stride() const { return stride_; }
  T* data() { return values_.data() + lead_; }
  const T* data() const { return values_.data() + lead_; }
  T& operator()(int64_t row, int64_t column) { return values_[static_cast<size_t>(lead_ + row * stride_ + column)]; }
  const T& operator()(int64_t row, int64_t column) const {
    return values_[static_cast<size_t>(lead_ + row * stride_ + column)];
  }

  bool gaps_untouched() const {
    bool untouched = poisoned(values_.data(), lead_);
    for (int64_t row = 0; row + 1 < rows_; ++row) {
      untouched &= poisoned(data() + row * stride_ + columns_, stride_ - columns_);
    }
    return untouched;
  }

  bool same_bits(const Matrix& other) const {
    return values_.size() == other.values_.size() &&
           (values_.empty() || std::memcmp(values_.data(), other.values_.data(), bytes()) == 0);
  }

 private:
  static bool poisoned(const T* first, int64_t count) {
    const auto* byte = reinterpret_cast<const unsigned char*>(first);
    return std::all_of(byte, byte + static_cast<size_t>(count) * sizeof(T), [](unsigned char b) { return b == 0xff; });
  }
  size_t bytes() const { return values_.size() * sizeof(T); }

  int64_t rows_, columns_, stride_, lead_;
  std::vector<T, GuardedAllocator<T>> values_;
};

}  // namespace neuroada::testing
