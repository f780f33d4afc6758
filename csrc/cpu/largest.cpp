// index[r, :] = columns of the k scores of row r that rank highest, rising; of equal ones the lower columns
//
// A row is read in blocks. The k best so far are a heap with the worst on top, and a block of which no
// score ranks above that one is done with. Of a long row the best of each block are looked at first:
// the k-th of them is a floor, below which nearly all scores lie, and stay out of the heap.
#include <algorithm>
#include <limits>

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

// A number for each score that rises with its rank; both zeros have the same.
template <Ranking by, class U>
inline U rank_of(U bits) {
  const U magnitude = magnitude_of(bits);
  if constexpr (by == Ranking::magnitude) return magnitude;
  if constexpr (by == Ranking::smallest) return static_cast<U>(kSign<U> - magnitude);
  return static_cast<U>(bits & kSign<U> ? kSign<U> - magnitude : kSign<U> + magnitude);
}

template <class U>
struct Chosen {
  U rank;
  int32_t column;
};

// Which of two is nearer to the top of a heap: the worse of two that are chosen, the higher column.
template <class U>
inline bool is_above(const Chosen<U>& a, const Chosen<U>& b) {
  return a.rank < b.rank || (a.rank == b.rank && a.column > b.column);
}
inline bool is_above(int32_t a, int32_t b) { return a > b; }

template <class E>
inline void sift_down(E* heap, int64_t count, int64_t at) {
  const E moved = heap[at];
  for (int64_t child; (child = 2 * at + 1) < count; at = child) {
    if (child + 1 < count && is_above(heap[child + 1], heap[child])) ++child;
    if (!is_above(heap[child], moved)) break;
    heap[at] = heap[child];
  }
  heap[at] = moved;
}

template <class E>
inline void make_heap(E* heap, int64_t count) {
  for (int64_t at = count / 2; at-- > 0;) sift_down(heap, count, at);
}

inline void sort(int32_t* columns, int64_t count) {
  make_heap(columns, count);
  while (count > 1) {
    --count;
    std::swap(columns[0], columns[count]);
    sift_down(columns, count, 0);
  }
}

constexpr int64_t kBlock = 64;

// Scores that are ranked together.
template <class U>
struct Block {
  U rank[kBlock];
  U best;        // the highest rank
  U widest = 0;  // the highest magnitude of all blocks so far

  template <Ranking by>
  void read(const U* bits, int64_t count) {
    U highest = 0, magnitude = widest;
    for (int64_t i = 0; i < count; ++i) {
      rank[i] = rank_of<by>(bits[i]);
      highest = std::max(highest, rank[i]);
      magnitude = std::max(magnitude, magnitude_of(bits[i]));
    }
    best = highest;
    widest = magnitude;
  }
};

// Calls f(block, first column, scores in it) for the blocks of a row; the highest magnitude of all.
template <class U, Ranking by, class F>
inline U each_block(const U* scores, int64_t columns, F&& f) {
  Block<U> block;
  int64_t first = 0;
  for (; first + kBlock <= columns; first += kBlock) {
    block.template read<by>(scores + first, kBlock);  // a length that the compiler knows
    f(block, first, kBlock);
  }
  if (first < columns) {
    block.template read<by>(scores + first, columns - first);
    f(block, first, columns - first);
  }
  return block.widest;
}

// The k best of what is added in the order of its columns.
template <class U>
struct Best {
  Chosen<U>* heap;
  int64_t k;
  int64_t count = 0;

  bool full() const { return count == k; }
  U worst() const { return heap[0].rank; }  // once it is full
  void add(U rank, int64_t column) {
    const Chosen<U> one{rank, static_cast<int32_t>(column)};
    if (full()) {
      if (rank <= worst()) return;
      heap[0] = one;
      sift_down(heap, k, 0);
    } else {
      heap[count++] = one;
      if (full()) make_heap(heap, k);
    }
  }
};

// The chosen columns of one row in the heap; false where there is a NaN.
template <class T, Ranking by>
bool choose(const Bits<T>* scores, int64_t columns, int64_t k, Chosen<Bits<T>>* heap) {
  using U = Bits<T>;
  // Where k blocks have a score of this rank, no lower one is among the k best of all.
  U floor = 0;
  if (columns / kBlock >= k) {
    Best<U> blocks{heap, k};
    each_block<U, by>(scores, columns, [&](const Block<U>& b, int64_t first, int64_t) { blocks.add(b.best, first); });
    floor = blocks.worst();
  }
  Best<U> best{heap, k};
  const U widest = each_block<U, by>(scores, columns, [&](const Block<U>& b, int64_t first, int64_t count) {
    if (b.best < floor || (best.full() && b.best <= best.worst())) return;
    for (int64_t i = 0; i < count; ++i) {
      if (b.rank[i] >= floor) best.add(b.rank[i], first + i);
    }
  });
  return widest <= kInfinity<T>;
}

template <class T, Ranking by>
void run(const Largest& a, const Executor& all) {
  using U = Bits<T>;
  static_assert(sizeof(Chosen<U>) <= Largest::kScratchBytes);
  const Executor executor = all.limited(a.rows * a.columns);
  const int64_t parts = executor.threads;
  executor.parallel(parts, [&](int64_t part) {
    auto* heap = reinterpret_cast<Chosen<U>*>(static_cast<char*>(a.scratch) + part * a.k * Largest::kScratchBytes);
    for (int64_t r = a.rows * part / parts; r < a.rows * (part + 1) / parts; ++r) {
      const bool ranked = choose<T, by>(static_cast<const U*>(a.scores) + r * a.stride, a.columns, a.k, heap);
      int32_t* index = a.index + r * a.k;
      for (int64_t s = 0; s < a.k; ++s) index[s] = ranked ? heap[s].column : -1;
      sort(index, a.k);
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
