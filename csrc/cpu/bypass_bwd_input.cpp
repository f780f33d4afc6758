// out[t, c] = sum over (j, s) with index[j, s] = c of delta[j, s] grad[t, j]
//
// The planner's column order turns the transposed product into the same gather as the forward one,
// with columns for rows: sums stay in registers, and no two tasks write one element.
#include "entry.h"
#include "neuroada/planner.h"
#include "staging.h"

namespace neuroada::cpu::NEUROADA_ISA {
namespace {

// x / divisor by one multiplication (Lemire, Kaser, Kurz 2019), for 32-bit x.
struct FastDivide {
  uint64_t reciprocal;
  explicit FastDivide(uint32_t divisor) : reciprocal(UINT64_MAX / std::max(divisor, 1u) + 1) {}
  uint32_t operator()(uint32_t x) const {
    return reciprocal == 0 ? x : static_cast<uint32_t>((static_cast<unsigned __int128>(reciprocal) * x) >> 64);
  }
};

template <class T, int block>
void run(const BypassBwdInput& a, const Executor& all) {
  using A = accumulate_t<T>;
  const PlanView plan(a.plan, a.d_in);
  const Executor executor = all.limited(a.tokens * (a.d_in + a.d_out) + (a.tokens + 8) * plan.live());
  // Each entry serves every block of tokens: find its row and its delta once.
  const Scratch<int32_t> neuron = make_scratch<int32_t>(plan.live());
  const Scratch<A> value = make_scratch<A>(plan.live());
  const FastDivide by_k(static_cast<uint32_t>(a.k));
  const int64_t parts = executor.threads;
  executor.parallel(parts, [&](int64_t part) {
    for (int64_t e = plan.live() * part / parts; e < plan.live() * (part + 1) / parts; ++e) {
      const uint32_t entry = static_cast<uint32_t>(plan.entry[e]);
      neuron[e] = static_cast<int32_t>(by_k(entry));
      value[e] = static_cast<const A*>(a.delta)[entry];
    }
  });

  const CsrRows<A> rows{neuron.get(), value.get(), plan.column_start};
  const GatherTasks tasks(a.tokens, a.d_in, block, executor.threads);
  executor.parallel(tasks.count(), [&](int64_t task) {
    const int64_t range = tasks.range(task);
    const int64_t first = plan.boundary(range, tasks.ranges), last = plan.boundary(range + 1, tasks.ranges);
    const T* none = nullptr;
    const Scratch<A> staged = make_scratch<A>(a.d_out * block);
    for (int64_t b = tasks.first_block(task); b < tasks.last_block(task); ++b) {
      const int64_t t = b * block, tokens = std::min<int64_t>(block, a.tokens - t);
      const T* grad = static_cast<const T*>(a.grad) + t * a.grad_stride;
      stage_transposed<A, block>(grad, a.grad_stride, tokens, 0, a.d_out, staged.get());
      gather_rows<T, block>(rows, staged.get(), first, last, tokens, none, 0, none,
                            static_cast<T*>(a.out) + t * a.out_stride, a.out_stride);
    }
  });
}

}  // namespace

void bypass_bwd_input(const BypassBwdInput& args, const Executor& executor) {
  with_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    with_block<accumulate_t<T>>(args.tokens, args.d_out, [&](auto block) { run<T, block>(args, executor); });
  });
}

}  // namespace neuroada::cpu::NEUROADA_ISA
