// The columns of the ELL matrix (index, delta) as rows, in the planner's order.
#pragma once

#include "neuroada/planner.h"
#include "staging.h"

namespace neuroada::cpu::NEUROADA_ISA {

// x / divisor by one multiplication (Lemire, Kaser, Kurz 2019), for 32-bit x.
struct FastDivide {
  uint64_t reciprocal;
  explicit FastDivide(uint32_t divisor) : reciprocal(UINT64_MAX / std::max(divisor, 1u) + 1) {}
  uint32_t operator()(uint32_t x) const {
    return reciprocal == 0 ? x : static_cast<uint32_t>((static_cast<unsigned __int128>(reciprocal) * x) >> 64);
  }
};

// Each entry's neuron and delta are looked up on every access.
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

// The same in CSR format, looked up once for many blocks of tokens.
template <class A>
struct CsrRows {
  const int32_t* start;
  Scratch<int32_t> columns;
  Scratch<A> values;

  CsrRows(const PlanRows<A>& rows, const Executor& executor)
      : start(rows.plan.column_start),
        columns(make_scratch<int32_t>(rows.plan.live())),
        values(make_scratch<A>(rows.plan.live())) {
    executor.parallel_ranges(rows.plan.live(), [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e) {
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

// Calls f with the rows in the form that is cheaper to read `times` times.
template <class A, class F>
void with_plan_rows(const BypassBwdInput& a, int64_t times, const Executor& all, F&& f) {
  const PlanView plan(a.plan, a.d_in);
  const PlanRows<A> rows{plan, static_cast<const A*>(a.delta), FastDivide(static_cast<uint32_t>(a.k))};
  if (times <= 1) return f(rows);
  return f(CsrRows<A>(rows, all.limited(8 * plan.live())));
}

}  // namespace neuroada::cpu::NEUROADA_ISA
