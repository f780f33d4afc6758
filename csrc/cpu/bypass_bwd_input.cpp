// out[t, c] = sum over (j, s) with index[j, s] = c of delta[j, s] grad[t, j]
//
// The planner's column order turns the transposed product into the same gather as the forward one,
// with columns in place of rows: sums stay in registers, and no two tasks write the same element.
#include "entry.h"
#include "plan_rows.h"
#include "staging.h"

namespace neuroada::cpu::NEUROADA_ISA {
namespace {

template <class T, int block, class Rows>
void gather_columns(const BypassBwdInput& a, const PlanView& plan, const Rows& rows, const GatherTasks& tasks,
                    const Executor& executor) {
  using A = accumulate_t<T>;
  executor.parallel(tasks.count(), [&](int64_t task) {
    const int64_t range = tasks.range(task);
    const int64_t first = plan.boundary(range, tasks.ranges), last = plan.boundary(range + 1, tasks.ranges);
    if (first == last) return;
    const T* none = nullptr;
    const Scratch<A> staged = make_scratch<A>(a.d_out * block);
    for (int64_t b = tasks.first_block(task); b < tasks.last_block(task); ++b) {
      const int64_t t = b * block, tokens = std::min<int64_t>(block, a.tokens - t);
      const T* grad = static_cast<const T*>(a.grad) + t * a.grad_stride;
      stage_transposed<WideCell<T>, block>(grad, a.grad_stride, tokens, 0, a.d_out, a.d_out, staged.get());
      gather_rows<T>(rows, StagedBlock<WideCell<T>, block>{staged.get()}, first, last, tokens, none, 0,
                     BiasTerm<T>{none}, static_cast<T*>(a.out) + t * a.out_stride, a.out_stride);
    }
  });
}

template <class T, int block>
void run(const BypassBwdInput& a, const Executor& all) {
  using A = accumulate_t<T>;
  const PlanView plan(a.plan, a.d_in);
  const Executor executor = all.limited(a.tokens * (a.d_in + a.d_out + plan.live()));
  // A plan holds splits for kSplits parts of equal work.
  const GatherTasks tasks(a.tokens, a.d_in, block, executor.threads, kSplits);
  with_plan_rows<A>(a, tasks.blocks, all,
                    [&](const auto& rows) { gather_columns<T, block>(a, plan, rows, tasks, executor); });
}

}  // namespace

void bypass_bwd_input(const BypassBwdInput& args, const Executor& executor) {
  with_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    with_block<accumulate_t<T>>(args.tokens, args.d_out, [&](auto block) { run<T, block>(args, executor); });
  });
}

}  // namespace neuroada::cpu::NEUROADA_ISA
