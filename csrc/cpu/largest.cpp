// index[r, :] = columns of the k highest-ranked scores of row r, ascending; ties go to the lower columns
//
// The k-th highest rank is the highest number that k ranks reach, found bit by bit with one vectorized,
// branch-free count per bit. In a long row, the k-th highest of the maxima of blocks comes first: a
// threshold that at least k scores reach, but few others. Only these are extracted and selected from.
#include <algorithm>

#include "entry.h"

namespace neuroada::cpu::NEUROADA_ISA {
namespace {

template <class T>
struct BitsOf {
  using type = uint16_t;
};
template <>
struct BitsOf<float> {
  using type = uint32_t;
};
template <>
struct BitsOf<double> {
  using type = uint64_t;
};
template <class T>
using Bits = typename BitsOf<T>::type;

template <class T>
inline constexpr Bits<T> kInfinity = 0x7c00u;
template <>
inline constexpr uint16_t kInfinity<BFloat16> = 0x7f80u;
template <>
inline constexpr uint32_t kInfinity<float> = 0x7f800000u;
template <>
inline constexpr uint64_t kInfinity<double> = 0x7ff0000000000000u;

template <class U>
inline constexpr U kSign = static_cast<U>(U{1} << (8 * sizeof(U) - 1));

template <class U>
inline U magnitude_of(U bits) {
  return static_cast<U>(bits & static_cast<U>(~kSign<U>));
}

// A number that increases with the rank of a score; both zeros have the same.
template <Ranking by, class U>
inline U rank_of(U bits) {
  const U magnitude = magnitude_of(bits);
  if constexpr (by == Ranking::magnitude) return magnitude;
  if constexpr (by == Ranking::smallest) return static_cast<U>(kSign<U> - magnitude);
  return static_cast<U>(bits & kSign<U> ? kSign<U> - magnitude : kSign<U> + magnitude);
}

// The highest number that at least k of n ranks reach.
template <class U, class F>
inline U kth_highest(int64_t n, int64_t k, F&& rank) {
  U found = 0;
  for (U bit = kSign<U>; bit != 0; bit = static_cast<U>(bit >> 1)) {
    const U tried = static_cast<U>(found | bit);
    int32_t reaching = 0;
    for (int64_t i = 0; i < n; ++i) reaching += rank(i) >= tried;
    if (reaching >= k) found = tried;
  }
  return found;
}

// Writes the columns of the k highest of n ranks; columns increase with i.
template <class U, class F, class G>
inline void write_highest(int64_t n, int64_t k, F&& rank, G&& column, int32_t* out) {
  const U least = kth_highest<U>(n, k, rank);
  int64_t room = k;  // for ranks equal to `least`
  for (int64_t i = 0; i < n; ++i) room -= rank(i) > least;
  for (int64_t i = 0; i < n; ++i) {
    const bool equal = rank(i) == least;
    if (rank(i) < least || (equal && room == 0)) continue;
    room -= equal;
    *out++ = column(i);
  }
}

constexpr int64_t kBlock = 64;  // scores
constexpr int64_t kMostBlocks = 2048;
constexpr int64_t kMostCandidates = 1024;

// Scores at or above the threshold, with room for one more block.
template <class U>
struct Candidates {
  U rank[kMostCandidates + kBlock];
  int32_t column[kMostCandidates + kBlock];
};

// Extracts all scores that could be among the k best. Returns how many, or -1 if they are too many, or the row has
// fewer than k or more than kMostBlocks blocks.
template <Ranking by, class U>
int64_t collect_candidates(const U* scores, int64_t columns, int64_t k, Candidates<U>& candidates) {
  const int64_t blocks = columns / kBlock;
  if (blocks < k || blocks > kMostBlocks) return -1;
  U best[kMostBlocks];
  for (int64_t b = 0; b < blocks; ++b) {
    U highest = 0;
    for (int64_t i = 0; i < kBlock; ++i) highest = std::max(highest, rank_of<by>(scores[b * kBlock + i]));
    best[b] = highest;
  }
  const U threshold = kth_highest<U>(blocks, k, [&](int64_t b) { return best[b]; });
  int64_t count = 0;
  for (int64_t b = 0; b * kBlock < columns; ++b) {
    if (b < blocks && best[b] < threshold) continue;
    if (count > kMostCandidates) return -1;
    for (int64_t i = b * kBlock; i < std::min((b + 1) * kBlock, columns); ++i) {
      candidates.rank[count] = rank_of<by>(scores[i]);
      candidates.column[count] = static_cast<int32_t>(i);
      count += candidates.rank[count] >= threshold;
    }
  }
  return count;
}

template <class U>
inline U max_magnitude(const U* scores, int64_t columns) {
  U magnitude = 0;
  for (int64_t i = 0; i < columns; ++i) magnitude = std::max(magnitude, magnitude_of(scores[i]));
  return magnitude;
}

template <class T, Ranking by>
void write_row(const Bits<T>* scores, int64_t columns, int64_t k, int32_t* out) {
  using U = Bits<T>;
  if (max_magnitude(scores, columns) > kInfinity<T>) {  // a NaN
    for (int64_t s = 0; s < k; ++s) out[s] = -1;
    return;
  }
  Candidates<U> candidates;
  const int64_t count = collect_candidates<by>(scores, columns, k, candidates);
  if (count < 0) {
    const auto column = [](int64_t i) { return static_cast<int32_t>(i); };
    return write_highest<U>(columns, k, [&](int64_t i) { return rank_of<by>(scores[i]); }, column, out);
  }
  const auto column = [&](int64_t i) { return candidates.column[i]; };
  write_highest<U>(count, k, [&](int64_t i) { return candidates.rank[i]; }, column, out);
}

template <class T, Ranking by>
void run(const Largest& a, const Executor& all) {
  using U = Bits<T>;
  const Executor executor = all.limited(a.rows * a.columns);
  executor.parallel_ranges(a.rows, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      write_row<T, by>(static_cast<const U*>(a.scores) + r * a.stride, a.columns, a.k, a.index + r * a.k);
    }
  });
}

template <class T>
void run_by(const Largest& args, const Executor& executor) {
  switch (args.by) {
    case Ranking::value: return run<T, Ranking::value>(args, executor);
    case Ranking::magnitude: return run<T, Ranking::magnitude>(args, executor);
    case Ranking::smallest: return run<T, Ranking::smallest>(args, executor);
  }
}

}  // namespace

void largest(const Largest& args, const Executor& executor) {
  with_dtype(args.dtype, [&](auto element) { run_by<decltype(element)>(args, executor); });
}

}  // namespace neuroada::cpu::NEUROADA_ISA
