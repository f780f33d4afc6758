// out[t, j] = base[t, j] + bias[j] + sum_s delta[j, s] x[t, index[j, s]]
//
// x [tokens, d_in] is staged a block of tokens at a time; each row j then adds k contiguous runs.
#include "entry.h"
#include "staging.h"

namespace neuroada::cpu::NEUROADA_ISA {
namespace {

template <class T, int block>
void run(const BypassFwd& a, const Executor& all) {
  using A = accumulate_t<T>;
  const Executor executor = all.limited(a.tokens * (a.d_in + a.d_out * (a.k + 1)));
  const EllRows<A> rows{a.index, static_cast<const A*>(a.delta), a.k};
  const BiasTerm<T> bias{static_cast<const T*>(a.bias)};
  const GatherTasks tasks(a.tokens, a.d_out, block, executor.threads);
  executor.parallel(tasks.count(), [&](int64_t task) {
    const int64_t range = tasks.range(task);
    const int64_t first = a.d_out * range / tasks.ranges, last = a.d_out * (range + 1) / tasks.ranges;
    const Scratch<A> staged = make_scratch<A>(a.d_in * block);
    for (int64_t b = tasks.first_block(task); b < tasks.last_block(task); ++b) {
      const int64_t t = b * block, tokens = std::min<int64_t>(block, a.tokens - t);
      const T* x = static_cast<const T*>(a.x) + t * a.x_stride;
      const T* base = a.base == nullptr ? nullptr : static_cast<const T*>(a.base) + t * a.base_stride;
      stage_transposed<WideCell<T>, block>(x, a.x_stride, tokens, 0, a.d_in, a.d_in, staged.get());
      gather_rows<T>(rows, StagedBlock<WideCell<T>, block>{staged.get()}, first, last, tokens, base, a.base_stride,
                     bias, static_cast<T*>(a.out) + t * a.out_stride, a.out_stride);
    }
  });
}

}  // namespace

void bypass_fwd(const BypassFwd& args, const Executor& executor) {
  with_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    with_block<accumulate_t<T>>(args.tokens, args.d_in, [&](auto block) { run<T, block>(args, executor); });
  });
}

}  // namespace neuroada::cpu::NEUROADA_ISA
