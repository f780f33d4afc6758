// original[j, s] = weight[j, index[j, s]], then weight[j, index[j, s]] += delta[j, s]
//
// The sum is taken in the accumulate type and rounded once to the weight's.
#include <algorithm>

#include "entry.h"

namespace neuroada::cpu::NEUROADA_ISA {
namespace {

template <class T>
void run(const Merge& a, const Executor& all) {
  using A = accumulate_t<T>;
  const Executor executor = all.limited(8 * a.d_out * a.k);
  const int64_t parts = executor.threads;
  executor.parallel(parts, [&](int64_t part) {
    for (int64_t j = a.d_out * part / parts; j < a.d_out * (part + 1) / parts; ++j) {
      T* row = static_cast<T*>(a.weight) + j * a.weight_stride;
      for (int64_t e = j * a.k; e < (j + 1) * a.k; ++e) {
        T& kept = static_cast<T*>(a.original)[e];
        kept = T{};
        if (a.index[e] < 0) continue;
        kept = row[a.index[e]];
        narrow(widen(kept) + static_cast<const A*>(a.delta)[e], row[a.index[e]]);
      }
    }
  });
}

}  // namespace

void merge(const Merge& args, const Executor& executor) {
  with_dtype(args.dtype, [&](auto element) { run<decltype(element)>(args, executor); });
}

}  // namespace neuroada::cpu::NEUROADA_ISA
