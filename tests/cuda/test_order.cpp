// Sums are taken in the order that kernels.h specifies, whatever the scheduler does: in one order per shape and device,
// one part of the tokens after another.
#include <set>

#include "cuda/staging.cuh"
#include "run_cuda.h"

using namespace neuroada::testing;
using neuroada::cuda::Device;

namespace {

// Real values: their sums round differently in another order.
constexpr Case kCases[] = {
    {40, 37, 70, 8, IndexKind::distinct, true, Base::separate, 0, Values::real},
    {17, 13, 100, 2, IndexKind::one_column, false, Base::none, 1, Values::real},
    {33, 21, 45, 3, IndexKind::ragged, false, Base::out, 3, Values::real, 1},
};

template <class T>
void runs_repeat_to_the_bit(const Case& c, const Device& device) {
  Random random(1);
  const Problem<T> problem(c, random);
  const Outputs<T> first = run(problem, device);
  CHECK(run(problem, device).same_bits(first), std::string(dtype_name<T>()) + ", " + c.name());
}

// out = ((part 0 + part 1) + part 2) + part 3 to the bit, where a part is the SDDMM of its tokens alone: three blocks.
template <class T>
void sddmm_adds_parts_in_order() {
  constexpr int64_t kBlock = neuroada::cuda::kTokens<T>, kParts = 4, kTokensAPart = 3 * kBlock;
  constexpr Device kWhole{64 << 10, 4, 32, 1 << 20}, kAlone{64 << 10, 1, 32, 0};
  Random random(2);
  const Case c{kParts * kTokensAPart, 29, 40, 3, IndexKind::distinct, false, Base::none, 0, Values::real};
  const Problem<T> problem(c, random);
  const Matrix<float> whole = run_sddmm(problem, kWhole);
  Matrix<float> sum(c.d_out, c.k);
  for (int64_t part = 0; part < kParts; ++part) {
    const Matrix<float> alone = run_sddmm(tokens_of(problem, part * kTokensAPart, (part + 1) * kTokensAPart), kAlone);
    for (int64_t j = 0; j < c.d_out; ++j) {
      for (int64_t s = 0; s < c.k; ++s) sum(j, s) = (part == 0 ? 0.0f : sum(j, s)) + alone(j, s);
    }
  }
  CHECK(whole.same_bits(sum), std::string(dtype_name<T>()) + ": parts are not added in their order");
}

// One part: the sum runs over the tokens, one after another.
void sddmm_sums_tokens_in_order() {
  constexpr int64_t kTokens = 5 * neuroada::cuda::kTokens<float>;
  Random random(3);
  const Case c{kTokens, 17, 33, 2, IndexKind::distinct, false, Base::none, 0, Values::real};
  const Problem<float> problem(c, random);
  const Matrix<float> actual = run_sddmm(problem, {64 << 10, 1, 32, 0});
  problem.each_connection([&](int64_t j, int64_t s, int64_t column) {
    float sum = 0;
    for (int64_t t = 0; t < kTokens; ++t) sum += problem.grad(t, j) * problem.x(t, column);
    CHECK(actual(j, s) == sum, "neuron " + std::to_string(j) + ", slot " + std::to_string(s));
  });
}

// An x with only the chosen columns gives the sums of the whole x, to the bit, whether there is room for all columns,
// for the chosen ones, or for fewer.
template <class T>
void sddmm_of_chosen_columns_has_the_bits_of_the_whole(const Device& device) {
  Random random(4);
  // So many neurons that the partition of neurons and tokens depends on the room for columns.
  const Case c{75, 1000, 300, 1, IndexKind::distinct, false, Base::none, 0, Values::real};
  const Problem<T> whole(c, random);
  Problem<T> chosen = whole;
  std::set<int32_t> columns;
  whole.each_connection([&](int64_t, int64_t, int64_t column) { columns.insert(static_cast<int32_t>(column)); });
  chosen.shape.d_in = static_cast<int64_t>(columns.size());
  chosen.x = Matrix<T>(c.tokens, chosen.shape.d_in);
  int32_t place = 0;
  for (const int32_t column : columns) {
    for (int64_t t = 0; t < c.tokens; ++t) chosen.x(t, place) = whole.x(t, column);
    for (int64_t j = 0; j < c.d_out; ++j) {
      if (whole.index(j, 0) == column) chosen.index(j, 0) = place;
    }
    ++place;
  }
  CHECK(run_sddmm(chosen, device, c.d_in).same_bits(run_sddmm(whole, device)),
        std::string(dtype_name<T>()) + " with room for " + std::to_string(device.shared_bytes / kQuad));
}

// The planner orders a neuron's slots for the banks in which the kernels stage the columns.
void the_planner_knows_where_columns_are_staged() {
  for (int32_t column = 0; column < 4096; ++column) {
    CHECK(neuroada::bank_of(column) == neuroada::cuda::place(column) % neuroada::kBanks, std::to_string(column));
  }
}

}  // namespace

int main() {
  each_cuda_dtype([](auto element) {
    using T = decltype(element);
    for (const Case& c : kCases) {
      runs_repeat_to_the_bit<T>(c, {64 << 10, 3, 64, 1 << 20});
      runs_repeat_to_the_bit<T>(c, {17 * kQuad, 3, 32, 1 << 20});
    }
    sddmm_adds_parts_in_order<T>();
    for (int64_t quads : {100, 500, 2000}) {
      sddmm_of_chosen_columns_has_the_bits_of_the_whole<T>({quads * kQuad, 3, 32, 1 << 20});
    }
  });
  sddmm_sums_tokens_in_order();
  the_planner_knows_where_columns_are_staged();
  return exit_status();
}
