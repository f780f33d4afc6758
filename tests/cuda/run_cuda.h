// Runs the CUDA kernels over a problem, on the CPU through host_cuda.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "cuda/kernels.h"
#include "problem.h"

namespace neuroada::testing {

// A device so small that small problems are partitioned as large ones are on a GPU.
struct TestDevice {
  const char* name;
  cuda::Device device;
};

inline constexpr int64_t kQuad = 16;  // bytes of one column of a staged block

// Calls f(element) for each dtype that the CUDA kernels have.
template <class F>
void each_cuda_dtype(F&& f) {
  f(float{});
  f(BFloat16{});
  f(Half{});
}

// The tokens [first, last) of a problem.
template <class T>
Problem<T> tokens_of(const Problem<T>& p, int64_t first, int64_t last) {
  Problem<T> part = p;
  part.shape.tokens = last - first;
  part.x = Matrix<T>(last - first, p.shape.d_in);
  part.grad = Matrix<T>(last - first, p.shape.d_out);
  for (int64_t t = first; t < last; ++t) {
    for (int64_t c = 0; c < p.shape.d_in; ++c) part.x(t - first, c) = p.x(t, c);
    for (int64_t j = 0; j < p.shape.d_out; ++j) part.grad(t - first, j) = p.grad(t, j);
  }
  return part;
}

template <class T>
cuda::Merge merge_problem(const Problem<T>& p, cuda::MergeMode mode, Matrix<T>& weight, Matrix<T>& original) {
  const Case& c = p.shape;
  return {dtype_of<T>(),   mode,           c.d_in,         c.d_out,        c.k, weight.data(),
          weight.stride(), p.index.data(), p.delta.data(), original.data()};
}

template <class T>
Matrix<float> run_sddmm(const Problem<T>& p, const cuda::Device& device, int64_t whole_d_in = 0) {
  const Case& c = p.shape;
  Matrix<float> out(c.d_out, c.k, 0, c.lead);
  cuda::Sddmm args{dtype_of<T>(), c.tokens,     c.d_in,         c.d_out, c.k,        p.grad.data(), p.grad.stride(),
                   p.x.data(),    p.x.stride(), p.index.data(), nullptr, out.data(), whole_d_in};
  const int64_t parts = cuda::sddmm_parts(args, device);
  Matrix<float> partial(parts > 1 ? parts * c.d_out : 0, c.k, 0, c.lead);
  args.partial = partial.data();
  cuda::sddmm(args, device, nullptr);
  return out;
}

template <class T>
void run_bypass_fwd(const Problem<T>& p, Outputs<T>& r, const cuda::Device& device) {
  const Case& c = p.shape;
  cuda::bypass_fwd({dtype_of<T>(), c.tokens, c.d_in, c.d_out, c.k, p.x.data(), p.x.stride(), p.index.data(),
                    p.delta.data(), base_of(p, r), p.base.stride(), bias_of(p), r.out.data(), r.out.stride()},
                   device, nullptr);
}

// With scratch of exactly the required size.
inline void run_bypass_bwd_input(cuda::BypassBwdInput args, const cuda::Device& device) {
  Matrix<cuda::WeightedNeuron> scratch(1, cuda::bypass_bwd_input_entries(args, device));
  args.scratch = scratch.data();
  cuda::bypass_bwd_input(args, device, nullptr);
}

// The plan with the order in which dx reads it.
inline std::vector<int32_t> ordered_plan(const std::vector<int32_t>& plan, const Case& c, const cuda::Device& device) {
  std::vector<int32_t> ordered = plan;
  const int64_t live = static_cast<int64_t>(plan.size()) - plan_size(c.d_in, 0);
  cuda::order_plan({c.d_in, c.d_out, c.k, plan.data(), live, ordered.data()}, device, nullptr);
  return ordered;
}

// With a plan, and again with the plan in order: the same bits if sums are exact, otherwise nearly the same values.
template <class T>
void run_bypass_bwd_input(const Problem<T>& p, Outputs<T>& r, const cuda::Device& device) {
  const Case& c = p.shape;
  const std::vector<int32_t> plan = make_plan(p.index, c.d_in), ordered = ordered_plan(plan, c, device);
  const int64_t live = static_cast<int64_t>(plan.size()) - plan_size(c.d_in, 0);
  const auto run = [&](const std::vector<int32_t>& by, Matrix<T>& out) {
    run_bypass_bwd_input({dtype_of<T>(), c.tokens, c.d_in, c.d_out, c.k, p.grad.data(), p.grad.stride(), by.data(),
                          live, p.delta.data(), nullptr, out.data(), out.stride()},
                         device);
  };
  Matrix<T> again = r.grad_x;
  run(plan, r.grad_x);
  run(ordered, again);
  const std::string where = std::string(dtype_name<T>()) + ", " + c.name() + ": an ordered plan";
  if (c.values == Values::grid) CHECK(again.same_bits(r.grad_x), where + ", other bits");
  CHECK(again.gaps_untouched(), where + ": wrote between rows");
  constexpr float kRelative = sizeof(T) == 2 ? 1.0f / 128 : 1e-5f;  // two adjacent values of 16 bits
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t i = 0; i < c.d_in; ++i) {
      const float found = widen(again(t, i)), expected = widen(r.grad_x(t, i));
      CHECK(same_value(found, expected) || std::fabs(found - expected) <= kRelative * std::fabs(expected) + 1e-4f,
            where + ", another dx");
    }
  }
}

// If a plan holds an order for such a dx, dx uses it: with an order without columns it has nothing to write. An order
// with other parameters is ignored.
template <class T>
void check_order_is_taken_at_its_word(const Case& c, const cuda::Device& device, const std::string& where) {
  Random random(8);
  const Problem<T> problem(c, random);
  const std::vector<int32_t> plan = make_plan(problem.index, c.d_in);
  const int64_t live = static_cast<int64_t>(plan.size()) - plan_size(c.d_in, 0);
  const Outputs<T> outputs = make_outputs(problem);
  const auto dx_by = [&](const std::vector<int32_t>& by) {
    Matrix<T> out = outputs.grad_x;
    run_bypass_bwd_input({dtype_of<T>(), c.tokens, c.d_in, c.d_out, c.k, problem.grad.data(), problem.grad.stride(),
                          by.data(), live, problem.delta.data(), nullptr, out.data(), out.stride()},
                         device);
    return out;
  };
  const Matrix<T> right = dx_by(plan);
  std::vector<int32_t> ordered = ordered_plan(plan, c, device);
  CHECK(dx_by(ordered).same_bits(right), where + ": another dx by the order");
  int32_t* const facts = ordered.data() + plan_size(c.d_in, 0) - order_size(c.d_in);
  std::fill_n(facts + kOrderFacts, order_size(c.d_in) - kOrderFacts, static_cast<int32_t>(c.d_in));
  CHECK(!dx_by(ordered).same_bits(right), where + ": an order without columns was not taken");
  for (int64_t fact : {int64_t{0}, int64_t{2}, int64_t{3}}) {
    ++facts[fact];
    CHECK(dx_by(ordered).same_bits(right), where + ": an order for something else was taken");
    --facts[fact];
  }
}

template <class T>
Outputs<T> run(const Problem<T>& p, const cuda::Device& device) {
  Outputs<T> r = make_outputs(p);
  run_bypass_fwd(p, r, device);
  run_bypass_bwd_input(p, r, device);
  r.grad_delta = run_sddmm(p, device);
  cuda::merge(merge_problem(p, cuda::MergeMode::merge, r.weight, r.original), device, nullptr);
  return r;
}

// The values of a plan are not checked on a GPU. Whatever they are, AddressSanitizer must see no access outside the
// arguments of dx, and no thread may wait at a barrier forever. Ranges of such a plan may overlap, and then several
// threads write the same values to the same addresses; ThreadSanitizer would report that.
template <class T>
void check_garbage_plans(const Case& c, const TestDevice& on) {
#ifdef __SANITIZE_THREAD__
  return;
#endif
  Random random(6);
  const Problem<T> problem(c, random);
  constexpr int64_t kLive = 50;
  for (int64_t range : {2, 60, 1 << 30}) {
    std::vector<int32_t> plan(static_cast<size_t>(plan_size(c.d_in, kLive)));
    for (int32_t& value : plan) value = static_cast<int32_t>(random.below(2 * range) - range / 4);
    // Also with random columns in an order that dx uses.
    std::vector<int32_t> ordered = ordered_plan(plan, c, on.device);
    int32_t* columns = ordered.data() + plan_size(c.d_in, 0) - order_size(c.d_in) + kOrderFacts;
    for (int64_t i = 0; i < c.d_in; ++i) columns[i] = static_cast<int32_t>(random.below(2 * range) - range / 4);
    for (const std::vector<int32_t>& by : {plan, ordered}) {
      Matrix<T> out(c.tokens, c.d_in, 3);
      run_bypass_bwd_input({dtype_of<T>(), c.tokens, c.d_in, c.d_out, c.k, problem.grad.data(), problem.grad.stride(),
                            by.data(), kLive, problem.delta.data(), nullptr, out.data(), out.stride()},
                           on.device);
      CHECK(out.gaps_untouched(), std::string("a garbage plan on ") + on.name + ": wrote between rows");
    }
  }
}

}  // namespace neuroada::testing
