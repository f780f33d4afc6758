// Every CUDA kernel, in every dtype, matches its formula over small shapes, for any device that it is partitioned for.
// Sums of grid values are exact, so outputs are compared for equality.
#include <initializer_list>
#include <utility>

#include "run_cuda.h"

using namespace neuroada::testing;
using neuroada::cuda::Device;
using neuroada::cuda::MergeMode;

namespace {

constexpr Device kRoomy{64 << 10, 4, 64, 1 << 20};  // two staged blocks per CTA, and several CTAs
constexpr TestDevice kDevices[] = {
    {"roomy", kRoomy},
    {"one CTA", {64 << 10, 1, 32, 1 << 20}},
    {"tiles of 24 columns", {25 * kQuad, 2, 64, 1 << 20}},
    {"tiles of 8 columns, scratch for one part", {9 * kQuad, 3, 32, 0}},
};

template <class T>
void check_case(const Case& c, const TestDevice& on, uint64_t seed) {
  Random random(seed);
  const Problem<T> problem(c, random);
  const std::string where = std::string(dtype_name<T>()) + " on " + on.name + ", " + c.name();
  check_outputs(run(problem, on.device), reference(problem), where);
}

void check_case(const Case& c, const TestDevice& on, uint64_t seed) {
  each_cuda_dtype([&](auto element) { check_case<decltype(element)>(c, on, seed); });
}

constexpr std::pair<int64_t, int64_t> kWeights[] = {{1, 5}, {5, 1}, {13, 70}, {37, 31}, {67, 33}};
constexpr int64_t kTokens[] = {0, 1, 7, 8, 9, 17, 40};

// Dtypes, index kinds, base, bias, strides, alignment and devices cycle over the shapes, each with its own period, so
// that all pairs of them occur.
void formulas_hold_over_shapes() {
  int64_t turn = 0;
  for (const auto& [d_in, d_out] : kWeights) {
    for (int64_t k : {int64_t{1}, int64_t{2}, int64_t{3}, int64_t{8}, int64_t{20}, d_in}) {
      if (k > d_in) continue;
      for (int64_t tokens : kTokens) {
        ++turn;
        Case c{tokens, d_in, d_out, k, static_cast<IndexKind>(turn / 4 % 4), turn / 2 % 2 == 0};
        c.base = static_cast<Base>(turn / 3 % 3);
        c.gap = turn % 5 < 3 ? 0 : turn % 5 == 3 ? 3 : 16 - d_in % 8;
        c.lead = turn % 11 < 5 ? 0 : turn % 11;
        const TestDevice& on = kDevices[turn % 4];
        if (turn % 3 == 0) check_case<float>(c, on, static_cast<uint64_t>(turn));
        if (turn % 3 == 1) check_case<neuroada::BFloat16>(c, on, static_cast<uint64_t>(turn));
        if (turn % 3 == 2) check_case<neuroada::Half>(c, on, static_cast<uint64_t>(turn));
      }
    }
  }
}

// Rows that can be read 8 bytes at a time, up to the last one and with columns left over.
void formulas_hold_for_aligned_rows() {
  for (const TestDevice& on : kDevices) {
    check_case({17, 64, 72, 8, IndexKind::ragged, true, Base::separate}, on, 1);
    check_case({19, 61, 67, 4, IndexKind::distinct, false, Base::out, 3}, on, 2);
    check_case({9, 200, 40, 3, IndexKind::distinct, true, Base::out}, on, 3);
  }
}

void formulas_hold_for_each_way_to_hand_over_the_output() {
  for (Base base : {Base::none, Base::separate, Base::out}) {
    for (int64_t lead : {0, 1}) {
      check_case({17, 21, 40, 3, IndexKind::ragged, lead == 0, base, 5, Values::grid, lead}, kDevices[2 * lead], 1);
    }
  }
}

// A float32 base, the result of a GEMM, is added to the bypass in float32, and the sum is rounded once: outputs are the
// float32 outputs, rounded.
template <class T>
void a_base_in_float32_is_rounded_once(const Case& c, const TestDevice& on) {
  Random random(7);
  const Problem<T> problem(c, random);
  const std::vector<int32_t> plan = make_plan(problem.index, c.d_in);
  const int64_t live = static_cast<int64_t>(plan.size()) - neuroada::plan_size(c.d_in, 0);
  Matrix<float> base(c.tokens, c.d_out, c.gap, c.lead), base_x(c.tokens, c.d_in, c.gap, c.lead);
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t j = 0; j < c.d_out; ++j) base(t, j) = static_cast<float>(random.below(1 << 12)) / 256;
    for (int64_t i = 0; i < c.d_in; ++i) base_x(t, i) = static_cast<float>(random.below(1 << 12)) / 256;
  }
  const neuroada::DType dtype = dtype_of<T>();
  Matrix<T> out(c.tokens, c.d_out), out_x(c.tokens, c.d_in);
  neuroada::cuda::bypass_fwd(
      {dtype, c.tokens, c.d_in, c.d_out, c.k, problem.x.data(), problem.x.stride(), problem.index.data(),
       problem.delta.data(), base.data(), base.stride(), bias_of(problem), out.data(), out.stride(), true},
      on.device, nullptr);
  run_bypass_bwd_input(
      {dtype, c.tokens, c.d_in, c.d_out, c.k, problem.grad.data(), problem.grad.stride(), plan.data(), live,
       problem.delta.data(), nullptr, out_x.data(), out_x.stride(), base_x.data(), base_x.stride()},
      on.device);
  for (int64_t t = 0; t < c.tokens; ++t) {
    for (int64_t j = 0; j < c.d_out; ++j) {
      float sum = c.bias ? neuroada::widen(bias_of(problem)[j]) : 0.0f;
      problem.each_connection([&](int64_t neuron, int64_t s, int64_t column) {
        if (neuron == j) sum += problem.delta(j, s) * neuroada::widen(problem.x(t, column));
      });
      T expected;
      neuroada::narrow(base(t, j) + sum, expected);
      CHECK(neuroada::widen(out(t, j)) == neuroada::widen(expected), std::string("out, ") + on.name);
    }
    for (int64_t i = 0; i < c.d_in; ++i) {
      float sum = 0;
      problem.each_connection([&](int64_t j, int64_t s, int64_t column) {
        if (column == i) sum += problem.delta(j, s) * neuroada::widen(problem.grad(t, j));
      });
      T expected;
      neuroada::narrow(base_x(t, i) + sum, expected);
      CHECK(neuroada::widen(out_x(t, i)) == neuroada::widen(expected), std::string("grad_x, ") + on.name);
    }
  }
}

// Enough neurons that a lane has each possible number of pairs.
void formulas_hold_for_many_neurons() {
  const TestDevice on{"lanes of 32", {64 << 10, 3, 32, 1 << 20}};
  for (int64_t k : {1, 2, 3, 4, 8, 20, 21}) {
    for (int64_t d_out : {130, 300, 601}) check_case({17, 40, d_out, k, IndexKind::ragged, k % 2 == 0}, on, 8);
  }
}

// Columns of 31, 32 and 33 neurons and more: a lane sums a light one, the warp a heavy one.
void formulas_hold_on_both_sides_of_a_heavy_column() {
  for (const TestDevice& on : kDevices) {
    for (int64_t d_out : {31, 32, 33, 100}) check_case({9, 13, d_out, 2, IndexKind::one_column}, on, 4);
  }
}

void formulas_hold_for_empty_sizes() {
  for (int64_t tokens : {0, 3}) {
    for (int64_t d_in : {0, 5}) {
      for (int64_t d_out : {0, 5}) {
        for (int64_t k : {0, 2}) {
          check_case({tokens, d_in, d_out, k, IndexKind::distinct, true, Base::separate}, kDevices[0], 4);
        }
      }
    }
  }
}

// A staged tile that is one column too wide changes what is launched, not the result.
void formulas_hold_at_the_edges_of_the_shared_memory() {
  for (int64_t quads : {9, 17, 24, 25, 26, 49, 50, 51}) {
    check_case({17, 24, 35, 3, IndexKind::ragged}, {"an edge", {quads * kQuad, 2, 32, 1 << 20}}, 5);
  }
}

void no_plan_reaches_outside_the_arguments() {
  for (const TestDevice& on : kDevices) check_garbage_plans<float>({9, 21, 40, 2}, on);
}

}  // namespace

int main() {
  formulas_hold_over_shapes();
  formulas_hold_for_aligned_rows();
  formulas_hold_for_each_way_to_hand_over_the_output();
  formulas_hold_for_many_neurons();
  for (const TestDevice& on : kDevices) {
    each_cuda_dtype([&](auto element) {
      a_base_in_float32_is_rounded_once<decltype(element)>({19, 24, 38, 3, IndexKind::ragged, true}, on);
      a_base_in_float32_is_rounded_once<decltype(element)>(
          {9, 21, 35, 2, IndexKind::ragged, false, Base::none, 1, Values::grid, 1}, on);
    });
  }
  formulas_hold_on_both_sides_of_a_heavy_column();
  formulas_hold_for_empty_sizes();
  formulas_hold_at_the_edges_of_the_shared_memory();
  no_plan_reaches_outside_the_arguments();
  return exit_status();
}
