// The fused kernels for sm_90a are their formulas, in tiles so small that few tokens make many of them,
// and in the tile that a GPU runs. Grid values are summed exactly: outputs are compared for equality.
#include "run_linear.h"

using namespace neuroada;
using namespace neuroada::testing;
using cuda::HopperTile;
using cuda::ProductTile;

namespace {

template <class T, class Tile>
void check_fwd(const Case& c, int64_t chunk = 0, int64_t out_gap = 0) {
  Random random(1);
  const Problem<T> problem(c, random);
  const Matrix<T> out = run_fwd<T, Tile>(problem, chunk > 0 ? chunk : whole(c.tokens), out_gap);
  check_rounded(out, reference(problem).linear, describe<Tile>("linear_fwd", dtype_name<T>(), c));
}

template <class T, class Tile>
void check_bwd(const Case& c, int64_t chunk = 0, int64_t out_gap = 0) {
  Random random(2);
  const Problem<T> problem(c, random);
  const Matrix<T> out = run_bwd<T, Tile>(problem, chunk > 0 ? chunk : whole(c.tokens), out_gap);
  check_rounded(out, reference(problem).linear_grad_x, describe<Tile>("linear_bwd_input", dtype_name<T>(), c));
}

using Narrow = ProductTile<1, 32, 2>;  // a strip narrower than 64 columns
using Small = ProductTile<1, 64, 2>;   // one block of 64 rows of W
using Two = ProductTile<2, 64, 3>;     // two consumers, and stages that no power of two counts

// Sizes round the edges of a tile: rows, columns and depth one short of it, on it and beyond, where a
// size may be anything; the shortest sum, and sums longer than the ring.
void forward_holds_over_shapes() {
  check_fwd<BFloat16, Narrow>({1, 8, 1, 1});
  check_fwd<BFloat16, Narrow>({63, 64, 31, 1, IndexKind::distinct, true});
  check_fwd<Half, Narrow>({65, 72, 33, 3, IndexKind::ragged, true, Base::none, 8});
  check_fwd<BFloat16, Narrow>({64, 128, 32, 8});
  check_fwd<Half, Narrow>({66, 200, 30, 2, IndexKind::empty_rows});
  check_fwd<BFloat16, Two>({129, 264, 65, 5, IndexKind::ragged, true}, 0, 7);
  check_fwd<Half, Two>({100, 72, 40, 1, IndexKind::one_column, false, Base::none, 16}, 0, 3);
}

void backward_holds_over_shapes() {
  check_bwd<BFloat16, Small>({1, 8, 8, 1});
  check_bwd<Half, Small>({63, 56, 64, 2, IndexKind::ragged});
  check_bwd<BFloat16, Two>({129, 72, 264, 3, IndexKind::distinct, false, Base::none, 8}, 0, 8);
  check_bwd<Half, Two>({100, 40, 72, 1, IndexKind::empty_rows, false, Base::none, 16}, 0, 3);
}

// A lane sums up to 32 connections, the four parts of a warp more, among them those of no token.
void sums_hold_on_both_sides_of_many_connections() {
  check_fwd<Half, Narrow>({70, 80, 5, 80, IndexKind::ragged, true});
  check_bwd<BFloat16, Small>({9, 16, 72, 2, IndexKind::one_column});
  check_bwd<BFloat16, Small>({9, 16, 32, 1, IndexKind::one_column});
}

void chunks_of_tokens_join() {
  check_fwd<BFloat16, Narrow>({130, 72, 30, 3, IndexKind::ragged, true}, Narrow::kRows);
  check_bwd<BFloat16, Small>({130, 40, 72, 3, IndexKind::ragged}, Small::kRows);
}

// Longer sums than its ring, both of its consumers, all strips of columns and all blocks of W's rows.
void the_tile_of_the_gpu_holds() {
  check_fwd<BFloat16, HopperTile>({100, 328, 252, 3, IndexKind::ragged, true});
  check_bwd<Half, HopperTile>({100, 248, 328, 3, IndexKind::ragged});
}

// Real values, whose sums round differently in another order.
void runs_repeat_to_the_bit() {
  Random random(3);
  const Problem<Half> problem({70, 72, 40, 5, IndexKind::ragged, true, Base::none, 0, Values::real}, random);
  CHECK((run_fwd<Half, Two>(problem, 72).same_bits(run_fwd<Half, Two>(problem, 72))), "linear_fwd");
  CHECK((run_bwd<Half, Two>(problem, 72).same_bits(run_bwd<Half, Two>(problem, 72))), "linear_bwd_input");
}

// bfloat16 outputs of the size 256 with a bypass of 2^-12 beside: one rounding, of the whole sum.
void the_sum_is_rounded_once() {
  Random random(4);
  Problem<BFloat16> p({8, 8, 32, 1, IndexKind::one_column, true}, random);
  for (int64_t j = 0; j < 32; ++j) {
    narrow(257.0f, p.bias(0, j));  // rounds to 256 in bfloat16, to even
    p.delta(j, 0) = 0x1p-12f;
    for (int64_t c = 0; c < 8; ++c) narrow(c == 1 ? 1.0f : 0.0f, p.weight(j, c));
  }
  for (int64_t t = 0; t < 8; ++t) {
    for (int64_t c = 0; c < 8; ++c) narrow(1.0f, p.x(t, c));
  }
  const Matrix<BFloat16> out = run_fwd<BFloat16, Narrow>(p, 8);
  check_rounded(out, reference(p).linear, "rounded once");
}

// Whatever the index and the plan hold, AddressSanitizer sees no access outside the arguments.
void no_index_and_no_plan_reach_outside_the_arguments() {
  Random random(6);
  Problem<BFloat16> p({9, 16, 40, 2}, random);
  Problem<BFloat16> without = p;
  for (int64_t j = 0; j < 40; ++j) {
    const int32_t strange[] = {16, -2, 1 << 30, INT32_MIN};
    p.index(j, j % 2) = strange[j % 4];
    without.index(j, j % 2) = -1;
  }
  check_rounded(run_fwd<BFloat16, Narrow>(p, 16), reference(without).linear, "columns out of range");

  constexpr int64_t kLive = 50;
  Matrix<BFloat16> out(9, 16), transposed(40, 16);
  Matrix<cuda::WeightedNeuron> ordered(1, kLive);
  std::vector<int32_t> plan(static_cast<size_t>(plan_size(16, kLive)));
  for (int64_t range : {60, 1 << 30}) {
    for (int32_t& value : plan) value = static_cast<int32_t>(random.below(2 * range) - range / 4);
    cuda::run_linear_bwd_input<Small>({{DType::bf16, 9, 16, 40, 2, p.grad.data(), 40, plan.data(), kLive,
                                        p.delta.data(), ordered.data(), out.data(), 16},
                                       p.weight.data(),
                                       16,
                                       16,
                                       transposed.data()},
                                      kLinearDevice, nullptr);
  }
}

void what_the_copies_cannot_take_is_refused() {
  const auto error = [](const Case& c) {
    return error_of([&] {
      Random random(5);
      run_fwd<BFloat16, Narrow>(Problem<BFloat16>(c, random), 8);
    });
  };
  CHECK(error({8, 12, 16, 1}) == "linear_fwd: x: 12 columns, expected a multiple of 8", error({8, 12, 16, 1}));
  const Case gap{8, 16, 16, 1, IndexKind::distinct, false, Base::none, 4};
  CHECK(error(gap) == "linear_fwd: x: stride 20, expected a multiple of 8", error(gap));
  const Case lead{8, 16, 16, 1, IndexKind::distinct, false, Base::none, 0, Values::grid, 4};
  CHECK(error(lead) == "linear_fwd: x: not 16-byte aligned", error(lead));
}

// As much as fits, or somewhat less where that leaves fewer multiprocessors idle in the last round.
void chunks_fit_the_workspace_and_fill_the_device() {
  constexpr cuda::Device kGpu{227 << 10, 132, 512, 32 << 20};
  const auto chunk = [&](int64_t tokens, int64_t width, int64_t columns) {
    return cuda::choose_chunk<HopperTile>(tokens, 2 * width, columns, kGpu);
  };
  CHECK(chunk(8192, 4096, 4096) == 32 * 128, std::to_string(chunk(8192, 4096, 4096)));
  CHECK(chunk(8192, 14336, 4096) == 8 * 128, std::to_string(chunk(8192, 14336, 4096)));
  CHECK(chunk(1021, 4096, 4096) == 1024, std::to_string(chunk(1021, 4096, 4096)));
  CHECK(chunk(3, 4096, 4096) == 8, std::to_string(chunk(3, 4096, 4096)));
  CHECK(chunk(8192, 1 << 20, 4096) == 128, std::to_string(chunk(8192, 1 << 20, 4096)));
}

}  // namespace

int main() {
  forward_holds_over_shapes();
  backward_holds_over_shapes();
  sums_hold_on_both_sides_of_many_connections();
  chunks_of_tokens_join();
  the_tile_of_the_gpu_holds();
  runs_repeat_to_the_bit();
  the_sum_is_rounded_once();
  no_index_and_no_plan_reach_outside_the_arguments();
  what_the_copies_cannot_take_is_refused();
  chunks_fit_the_workspace_and_fill_the_device();
  return exit_status();
}
