// out[t, c] = sum over (j, s) with index[j, s] = c of delta[j, s] grad[t, j]
//
// The planner's column order turns the transposed product into the same gather as the forward one,
// with columns for rows: sums stay in registers, and no two tasks write one element.
#include "entry.h"
#include "neuroada/planner.h"
#include "staging.h"

namespace neuroada::cpu::NEUROADA_ISA {
namespace {

template <class T, int vectors>
void run(const BypassBwdInput& a, const Executor& executor) {
  using A = accumulate_t<T>;
  constexpr int block = kBlock<A, vectors>;
  const PlanView plan(a.plan, a.d_in);
  // Each entry serves every block of tokens: find its row and its delta once.
  const Scratch<int32_t> neuron = make_scratch<int32_t>(plan.live());
  const Scratch<A> value = make_scratch<A>(plan.live());
  const int64_t parts = std::min<int64_t>(executor.threads, plan.live() / 1024 + 1);
  executor.parallel(parts, [&](int64_t part) {
    const uint32_t k = static_cast<uint32_t>(a.k);
    for (int64_t e = plan.live() * part / parts; e < plan.live() * (part + 1) / parts; ++e) {
      const uint32_t entry = static_cast<uint32_t>(plan.entry[e]);
      neuron[e] = static_cast<int32_t>(entry / k);
      value[e] = static_cast<const A*>(a.delta)[entry];
    }
  });

  const CsrRows<A> rows{neuron.get(), value.get(), plan.column_start};
  const GatherTasks tasks(a.tokens, a.d_in, block, executor.threads);
  executor.parallel(tasks.count(), [&](int64_t task) {
    const int64_t t = task / tasks.ranges * block, range = task % tasks.ranges;
    const int64_t tokens = std::min<int64_t>(block, a.tokens - t);
    const Scratch<A> staged = make_scratch<A>(a.d_out * block);
    stage_transposed<A, block>(static_cast<const T*>(a.grad) + t * a.grad_stride, a.grad_stride, tokens, 0, a.d_out,
                               staged.get());
    gather_rows<T, block>(rows, staged.get(), plan.boundary(range, tasks.ranges),
                          plan.boundary(range + 1, tasks.ranges), tokens, static_cast<const T*>(nullptr), 0,
                          static_cast<const T*>(nullptr), static_cast<T*>(a.out) + t * a.out_stride, a.out_stride);
  });
}

}  // namespace

void bypass_bwd_input(const BypassBwdInput& args, const Executor& executor) {
  with_dtype(args.dtype, [&](auto element) { run<decltype(element), 2>(args, executor); });
}

}  // namespace neuroada::cpu::NEUROADA_ISA
