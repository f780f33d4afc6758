// out[t, i] = x[t, columns[i]], values copied unchanged.
//
// With AVX-512, a vector at a time: a permutation moves the columns that are within one vector of a row to their
// places in the output. The permutations are the same for every row and are computed once.
#include <algorithm>

#include "entry.h"
#include "staging.h"

namespace neuroada::cpu::NEUROADA_ISA {
namespace {

template <class T>
void copy_row(const T* x, const int32_t* columns, int64_t count, T* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = x[columns[i]];
}

#if defined(__AVX512BW__)

// Lane numbers of a permutation, as wide as the values.
template <size_t bytes>
struct Lanes;
template <>
struct Lanes<2> {
  using Number = uint16_t;
  static __m512i permute(__m512i numbers, __m512i values) { return _mm512_permutexvar_epi16(numbers, values); }
};
template <>
struct Lanes<4> {
  using Number = uint32_t;
  static __m512i permute(__m512i numbers, __m512i values) { return _mm512_permutexvar_epi32(numbers, values); }
};
template <>
struct Lanes<8> {
  using Number = uint64_t;
  static __m512i permute(__m512i numbers, __m512i values) { return _mm512_permutexvar_epi64(numbers, values); }
};

// For runs of columns, each within one vector of a row: the beginning of the vector in the row, the place of the run in
// the output, and the permutation.
template <class T>
class Runs {
 public:
  using Number = typename Lanes<sizeof(T)>::Number;
  static constexpr int64_t kValues = 64 / sizeof(T);

  // `d_in` is at least kValues.
  Runs(const int32_t* columns, int64_t count, int64_t d_in)
      : columns_(columns), count_(count), d_in_(d_in), size_(each([](auto...) {})) {
    source_ = make_scratch<int32_t>(size_);
    target_ = make_scratch<int64_t>(size_);
    numbers_ = make_scratch<Number>(size_ * kValues);
    each([&](int64_t run, int64_t first, int64_t length, int32_t source) {
      source_[run] = source;
      target_[run] = first;
      Number* numbers = numbers_.get() + run * kValues;
      for (int64_t i = 0; i < kValues; ++i) {
        numbers[i] = i < length ? static_cast<Number>(columns_[first + i] - source) : Number{0};
      }
    });
    whole_ = size_;
    while (whole_ > 0 && target_[whole_ - 1] + kValues > count_) --whole_;
  }

  // Each run writes a whole vector, and the next runs overwrite what is past its end. Runs that would write past the
  // end of the output row, where another thread may have written, go through a buffer.
  void copy_row(const T* x, T* out) const {
    for (int64_t run = 0; run < whole_; ++run) store_whole(out + target_[run], permuted(x, run));
    if (whole_ == size_) return;
    alignas(64) T rest[2 * kValues];
    const int64_t first = target_[whole_];
    for (int64_t run = whole_; run < size_; ++run) store_whole(rest + target_[run] - first, permuted(x, run));
    std::memcpy(out + first, rest, static_cast<size_t>(count_ - first) * sizeof(T));
  }

 private:
  const int32_t* columns_;
  int64_t count_, d_in_, size_, whole_ = 0;  // size_: runs; whole_: those that may be written as whole vectors
  Scratch<int32_t> source_;
  Scratch<int64_t> target_;
  Scratch<Number> numbers_;

  // Calls f(run, first, length, source) for each run of columns and returns their number.
  template <class F>
  int64_t each(F&& f) const {
    int64_t run = 0;
    for (int64_t first = 0, length; first < count_; first += length, ++run) {
      const int32_t source = static_cast<int32_t>(std::min(columns_[first] / kValues * kValues, d_in_ - kValues));
      const auto within = [&](int32_t column) { return column >= source && column < source + kValues; };
      for (length = 1; length < std::min(kValues, count_ - first) && within(columns_[first + length]);) ++length;
      f(run, first, length, source);
    }
    return run;
  }

  __m512i permuted(const T* x, int64_t run) const {
    const __m512i values = _mm512_loadu_si512(x + source_[run]);
    return Lanes<sizeof(T)>::permute(_mm512_load_si512(numbers_.get() + run * kValues), values);
  }
  static void store_whole(T* target, __m512i values) { _mm512_storeu_si512(target, values); }
};

#endif

// Calls copy(x row, out row) for every token.
template <class T, class F>
void each_token(const Columns& a, const Executor& all, F&& copy) {
  const Executor executor = all.limited(2 * a.tokens * a.count);
  executor.parallel_ranges(a.tokens, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      copy(static_cast<const T*>(a.x) + t * a.x_stride, static_cast<T*>(a.out) + t * a.count);
    }
  });
}

}  // namespace

void columns(const Columns& args, const Executor& executor) {
  with_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
#if defined(__AVX512BW__)
    if (args.d_in >= Runs<T>::kValues) {
      const Runs<T> runs(args.columns, args.count, args.d_in);
      return each_token<T>(args, executor, [&](const T* x, T* out) { runs.copy_row(x, out); });
    }
#endif
    each_token<T>(args, executor, [&](const T* x, T* out) { copy_row(x, args.columns, args.count, out); });
  });
}

}  // namespace neuroada::cpu::NEUROADA_ISA
