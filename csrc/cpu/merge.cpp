// merge:   original[j, s] = W[j, index[j, s]], then W[j, index[j, s]] = round(W + delta[j, s])
// gather:  original[j, s] = W[j, index[j, s]]
// patch:   W[j, index[j, s]] = round(original[j, s] + delta[j, s])
// restore: W[j, index[j, s]] = original[j, s]
//
// The sum is taken in the accumulate type and rounded once to the weight's.
#include <algorithm>

#include "entry.h"

namespace neuroada::cpu::NEUROADA_ISA {
namespace {

template <class T, MergeMode mode>
void run(const Merge& a, const Executor& all) {
  using A = accumulate_t<T>;
  constexpr bool reads_weight = mode == MergeMode::merge || mode == MergeMode::gather;
  constexpr bool adds_delta = mode == MergeMode::merge || mode == MergeMode::patch;
  // Each entry is in a cache line, and mostly a page, of its own, which earlier GEMMs have evicted.
  constexpr int64_t kMissCost = 256;  // in multiply-adds
  const Executor executor = all.limited(kMissCost * a.d_out * a.k);
  T* const original = static_cast<T*>(a.original);
  executor.parallel_ranges(a.d_out, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      T* row = static_cast<T*>(a.weight) + j * a.weight_stride;
      for (int64_t e = j * a.k; e < (j + 1) * a.k; ++e) {
        const int32_t column = a.index[e];
        if constexpr (reads_weight) original[e] = column < 0 ? T{} : row[column];
        if (column < 0) continue;
        if constexpr (adds_delta) narrow(widen(original[e]) + static_cast<const A*>(a.delta)[e], row[column]);
        if constexpr (mode == MergeMode::restore) row[column] = original[e];
      }
    }
  });
}

template <class T>
void run_mode(const Merge& args, const Executor& executor) {
  switch (args.mode) {
    case MergeMode::merge: return run<T, MergeMode::merge>(args, executor);
    case MergeMode::gather: return run<T, MergeMode::gather>(args, executor);
    case MergeMode::patch: return run<T, MergeMode::patch>(args, executor);
    case MergeMode::restore: return run<T, MergeMode::restore>(args, executor);
  }
}

}  // namespace

void merge(const Merge& args, const Executor& executor) {
  with_dtype(args.dtype, [&](auto element) { run_mode<decltype(element)>(args, executor); });
}

}  // namespace neuroada::cpu::NEUROADA_ISA
