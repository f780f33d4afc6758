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

// The columns of the ELL matrix, as rows: each entry's neuron and delta are looked up where they stand.
template <class A>
struct PlanRows {
  PlanView plan;
  const A* delta;
  FastDivide by_k;
  int64_t begin(int64_t row) const { return plan.column_start[row]; }
  int64_t end(int64_t row) const { return plan.column_start[row + 1]; }
  int32_t column(int64_t e) const { return static_cast<int32_t>(by_k(static_cast<uint32_t>(plan.entry[e]))); }
  A value(int64_t e) const { return delta[plan.entry[e]]; }
};

// The same, looked up once for many blocks of tokens: a sparse matrix in CSR format.
template <class A>
struct CsrRows {
  const int32_t* start;
  Scratch<int32_t> columns;
  Scratch<A> values;

  CsrRows(const PlanRows<A>& rows, const Executor& executor)
      : start(rows.plan.column_start),
        columns(make_scratch<int32_t>(rows.plan.live())),
        values(make_scratch<A>(rows.plan.live())) {
    const int64_t live = rows.plan.live(), parts = executor.threads;
    executor.parallel(parts, [&](int64_t part) {
      for (int64_t e = live * part / parts; e < live * (part + 1) / parts; ++e) {
        columns[e] = rows.column(e);
        values[e] = rows.value(e);
      }
    });
  }
  int64_t begin(int64_t row) const { return start[row]; }
  int64_t end(int64_t row) const { return start[row + 1]; }
  int32_t column(int64_t e) const { return columns[e]; }
  A value(int64_t e) const { return values[e]; }
};

template <class T, int block, class Rows>
void gather_columns(const BypassBwdInput& a, const PlanView& plan, const Rows& rows, const GatherTasks& tasks,
                    const Executor& executor) {
  using A = accumulate_t<T>;
  executor.parallel(tasks.count(), [&](int64_t task) {
    const int64_t range = tasks.range(task);
    const int64_t first = plan.boundary(range, tasks.ranges), last = plan.boundary(range + 1, tasks.ranges);
    const T* none = nullptr;
    const Scratch<A> staged = make_scratch<A>(a.d_out * block);
    for (int64_t b = tasks.first_block(task); b < tasks.last_block(task); ++b) {
      const int64_t t = b * block, tokens = std::min<int64_t>(block, a.tokens - t);
      const T* grad = static_cast<const T*>(a.grad) + t * a.grad_stride;
      stage_transposed<A, block>(grad, a.grad_stride, tokens, 0, a.d_out, a.d_out, staged.get());
      gather_rows<T, block>(rows, staged.get(), first, last, tokens, none, 0, none,
                            static_cast<T*>(a.out) + t * a.out_stride, a.out_stride);
    }
  });
}

template <class T, int block>
void run(const BypassBwdInput& a, const Executor& all) {
  using A = accumulate_t<T>;
  const PlanView plan(a.plan, a.d_in);
  const Executor executor = all.limited(a.tokens * (a.d_in + a.d_out + plan.live()));
  const GatherTasks tasks(a.tokens, a.d_in, block, executor.threads);
  const PlanRows<A> rows{plan, static_cast<const A*>(a.delta), FastDivide(static_cast<uint32_t>(a.k))};
  if (tasks.blocks <= 1) {
    gather_columns<T, block>(a, plan, rows, tasks, executor);
  } else {
    gather_columns<T, block>(a, plan, CsrRows<A>(rows, all.limited(8 * plan.live())), tasks, executor);
  }
}

}  // namespace

void bypass_bwd_input(const BypassBwdInput& args, const Executor& executor) {
  with_dtype(args.dtype, [&](auto element) {
    using T = decltype(element);
    with_block<accumulate_t<T>>(args.tokens, args.d_out, [&](auto block) { run<T, block>(args, executor); });
  });
}

}  // namespace neuroada::cpu::NEUROADA_ISA
