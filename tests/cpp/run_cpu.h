// Runs the CPU kernels over a problem, in every instruction set that was built and runs here.
#pragma once

#include <string>

#include "cpu/kernels.h"
#include "problem.h"

namespace neuroada::testing {

template <class T>
void run_mode(const Problem<T>& p, MergeMode mode, Matrix<T>& weight, Matrix<T>& original, const cpu::Kernels& kernels,
              const cpu::Executor& executor) {
  kernels.merge({dtype_of<T>(), mode, p.shape.d_out, p.shape.k, weight.data(), weight.stride(), p.index.data(),
                 p.delta.data(), original.data()},
                executor);
}

template <class T>
Outputs<T> run(const Problem<T>& p, const cpu::Kernels& kernels, const cpu::Executor& executor) {
  const Case& c = p.shape;
  const DType dtype = dtype_of<T>();
  Outputs<T> r = make_outputs(p);
  cpu::BypassFwd forward{dtype,           c.tokens,     c.d_in,         c.d_out,        c.k,
                         p.x.data(),      p.x.stride(), p.index.data(), p.delta.data(), base_of(p, r),
                         p.base.stride(), bias_of(p),   r.out.data(),   r.out.stride()};
  kernels.bypass_fwd(forward, executor);
  const std::vector<int32_t> plan = make_plan(p.index, c.d_in);
  cpu::BypassBwdInput backward{
      dtype,       c.tokens,       c.d_in,          c.d_out,          c.k, p.grad.data(), p.grad.stride(),
      plan.data(), p.delta.data(), r.grad_x.data(), r.grad_x.stride()};
  kernels.bypass_bwd_input(backward, executor);

  r.has_linear = true;
  r.linear = Matrix<T>(c.tokens, c.d_out, c.gap, c.lead);
  r.linear_grad_x = Matrix<T>(c.tokens, c.d_in, c.gap + 1, c.lead);
  forward.base = nullptr;
  forward.out = r.linear.data();
  forward.out_stride = r.linear.stride();
  kernels.linear_fwd({forward, p.weight.data(), p.weight.stride()}, executor);
  backward.out = r.linear_grad_x.data();
  backward.out_stride = r.linear_grad_x.stride();
  kernels.linear_bwd_input({backward, p.weight.data(), p.weight.stride()}, executor);

  kernels.sddmm({dtype, c.tokens, c.d_in, c.d_out, c.k, p.grad.data(), p.grad.stride(), p.x.data(), p.x.stride(),
                 p.index.data(), r.grad_delta.data()},
                executor);
  run_mode(p, MergeMode::merge, r.weight, r.original, kernels, executor);
  return r;
}

// Even the smallest work is split among all threads.
inline constexpr int64_t kSmallestGrain = 1;

// Splits the work as for `threads` threads, and runs the tasks on the calling thread, in reverse order.
inline cpu::Executor sequential(int64_t threads) {
  const auto run = [](int64_t tasks, void (*body)(void*, int64_t), void* context) {
    while (tasks > 0) body(context, --tasks);
  };
  return {threads, run, kSmallestGrain};
}

// Calls f(kernels) for every instruction set that was built and runs here.
template <class F>
void each_isa(F&& f) {
  for (const char* isa : {NEUROADA_ISA_NAMES}) {
    if (const cpu::Kernels* kernels = cpu::kernels_for(isa)) f(*kernels);
  }
}

// Calls f(element) with a value of each element type, of which only the type matters.
template <class F>
void each_dtype(F&& f) {
  for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) with_dtype(dtype, f);
}

template <class T>
std::string label(const cpu::Kernels& kernels) {
  return std::string(kernels.isa) + " " + dtype_name<T>();
}

}  // namespace neuroada::testing
