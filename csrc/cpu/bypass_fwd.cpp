// out[t, j] = base[t, j] + bias[j] + sum_s delta[j, s] x[t, index[j, s]]
//
// x [tokens, d_in] is staged a block of tokens at a time; each row j then adds k contiguous runs.
#include "entry.h"
#include "staging.h"

namespace neuroada::cpu::NEUROADA_ISA {
namespace {

template <class T, int vectors>
void run(const BypassFwd& a, const Executor& executor) {
  using A = accumulate_t<T>;
  constexpr int block = kBlock<A, vectors>;
  const EllRows<A> rows{a.index, static_cast<const A*>(a.delta), a.k};
  const GatherTasks tasks(a.tokens, a.d_out, block, executor.threads);
  executor.parallel(tasks.count(), [&](int64_t task) {
    const int64_t t = task / tasks.ranges * block, range = task % tasks.ranges;
    const int64_t tokens = std::min<int64_t>(block, a.tokens - t);
    const Scratch<A> staged = make_scratch<A>(a.d_in * block);
    stage_transposed<A, block>(static_cast<const T*>(a.x) + t * a.x_stride, a.x_stride, tokens, 0, a.d_in, staged.get());
    const T* base = a.base == nullptr ? nullptr : static_cast<const T*>(a.base) + t * a.base_stride;
    gather_rows<T, block>(rows, staged.get(), a.d_out * range / tasks.ranges, a.d_out * (range + 1) / tasks.ranges,
                          tokens, base, a.base_stride, static_cast<const T*>(a.bias),
                          static_cast<T*>(a.out) + t * a.out_stride, a.out_stride);
  });
}

}  // namespace

void bypass_fwd(const BypassFwd& args, const Executor& executor) {
  with_dtype(args.dtype, [&](auto element) { run<decltype(element), 2>(args, executor); });
}

}  // namespace neuroada::cpu::NEUROADA_ISA
