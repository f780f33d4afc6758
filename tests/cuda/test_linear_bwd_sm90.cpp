// dx and the SDDMM in one pass over grad, for sm_90a: both are their formulas, in tiles so small that few
// tokens make many of them, and in the tile that a GPU runs.
#include "run_linear.h"

using namespace neuroada;
using namespace neuroada::testing;
using cuda::HopperBwdTile;
using cuda::ProductTile;

namespace {

using Small = ProductTile<1, 64, 2>;
using Two = ProductTile<2, 64, 3, 32>;  // two consumers, and stages that no power of two counts

template <class T, class Tile>
void check_both(const Case& c, int64_t chunk = 0, int64_t out_gap = 0) {
  Random random(1);
  const Problem<T> problem(c, random);
  const Gradients<T> found = run_both<T, Tile>(problem, chunk > 0 ? chunk : whole(c.tokens), out_gap);
  const Outputs<double> expected = reference(problem);
  const std::string what = describe<Tile>("linear_bwd", dtype_name<T>(), c);
  check_rounded(found.grad_x, expected.linear_grad_x, what + ", dx");
  check_rounded(found.grad_delta, expected.grad_delta, what + ", ddelta");
}

// Sizes round the edges of a tile: its tokens and columns, its pieces of 64 neurons and their groups of 16.
void both_hold_over_shapes() {
  check_both<BFloat16, Small>({1, 8, 8, 1});
  check_both<Half, Small>({63, 56, 64, 2, IndexKind::ragged});
  check_both<BFloat16, Small>({65, 136, 200, 3, IndexKind::empty_rows, false, Base::none, 8});
  check_both<BFloat16, Two>({129, 72, 264, 3, IndexKind::distinct, false, Base::none, 8}, 0, 8);
  check_both<Half, Two>({100, 128, 72, 5, IndexKind::ragged, false, Base::none, 16}, 0, 3);
}

// Eight connections of a group of neurons are multiplied together: seven, eight, nine, and very many.
void batches_of_any_length_hold() {
  check_both<Half, Small>({9, 64, 8, 1, IndexKind::one_column});
  check_both<BFloat16, Small>({9, 64, 24, 1, IndexKind::one_column});
  check_both<Half, Small>({70, 72, 16, 70, IndexKind::ragged});
}

void chunks_of_tokens_join() { check_both<BFloat16, Small>({130, 72, 40, 3, IndexKind::ragged}, Small::kRows); }

void the_tile_of_the_gpu_holds() { check_both<Half, HopperBwdTile>({150, 328, 248, 3, IndexKind::ragged}); }

constexpr Case kReal{130, 136, 72, 5, IndexKind::ragged, false, Base::none, 0, Values::real};

// ddelta is the sums of the tiles of tokens, added in their order from the first: real values would round
// differently in another. So chunks make no difference to the bit, and runs none.
void tiles_of_tokens_are_added_in_order() {
  Random random(2);
  const Problem<Half> problem(kReal, random);
  const Matrix<float> at_once = run_both<Half, Small>(problem, 136).grad_delta;
  Matrix<float> sum(kReal.d_out, kReal.k);
  for (int64_t first = 0; first < kReal.tokens; first += Small::kRows) {
    const int64_t last = std::min<int64_t>(first + Small::kRows, kReal.tokens);
    const Matrix<float> alone = run_both<Half, Small>(tokens_of(problem, first, last), whole(last - first)).grad_delta;
    for (int64_t j = 0; j < kReal.d_out; ++j) {
      for (int64_t s = 0; s < kReal.k; ++s) sum(j, s) = (first == 0 ? 0.0f : sum(j, s)) + alone(j, s);
    }
  }
  CHECK(at_once.same_bits(sum), "the tiles of tokens are not added in their order");
  CHECK((run_both<Half, Small>(problem, Small::kRows).grad_delta.same_bits(sum)), "chunks make a difference");
  CHECK((run_both<Half, Small>(problem, 136).grad_delta.same_bits(at_once)), "runs make a difference");
}

// A column out of range is a slot without a connection, and disturbs no other.
void no_index_reaches_outside_the_arguments() {
  Random random(3);
  Problem<BFloat16> p({9, 72, 40, 2}, random);
  BackwardRun<BFloat16> unused(p, 16, 0);
  Problem<BFloat16> without = p;
  for (int64_t j = 0; j < 40; ++j) {
    const int32_t strange[] = {72, -2, 1 << 30, INT32_MIN, 127};
    without.index(j, j % 2) = -1;
    p.index(j, j % 2) = strange[j % 5];
  }
  const Outputs<double> expected = reference(without);
  Matrix<int32_t> start(1, 3 * 3);
  Matrix<cuda::BlockEntry> entry(40, 2);
  Matrix<float> partial(40, 2), grad_delta(40, 2);
  cuda::run_linear_bwd<Small>({unused.args, p.x.data(), p.x.stride(), p.index.data(), start.data(), entry.data(),
                               partial.data(), grad_delta.data()},
                              kLinearDevice, nullptr);
  check_rounded(grad_delta, expected.grad_delta, "columns out of range");
}

// Infinite values stay with their neuron and with the connections of their column.
void values_that_are_not_finite_stay_where_they_belong() {
  Random random(4);
  Problem<BFloat16> p({70, 72, 40, 3}, random);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  for (int64_t t = 0; t < 70; ++t) narrow(t % 2 ? kInfinity : -kInfinity, p.grad(t, 7));
  narrow(kInfinity, p.x(69, p.index(9, 1)));
  check_rounded(run_both<BFloat16, Small>(p, 72).grad_delta, reference(p).grad_delta, "infinite values");
}

void the_entries_of_a_block_are_those_of_its_columns() {
  constexpr int64_t kWidth = 64, kGroups = 3, kBlocks = 4;
  Random random(5);
  const Case c{1, 200, 40, 5, IndexKind::ragged};
  const Matrix<int32_t> index = make_index(c, random);
  Matrix<int32_t> start(kBlocks + 1, kGroups);
  Matrix<cuda::BlockEntry> entry(c.d_out, c.k);
  cuda::block_entries({c.d_in, c.d_out, c.k, kWidth, index.data(), start.data(), entry.data()}, kLinearDevice, nullptr);
  for (int64_t group = 0; group < kGroups; ++group) {
    const int64_t base = group * 16 * c.k, end = std::min(base + 16 * c.k, c.d_out * c.k);
    int64_t at = 0;
    for (int64_t block = 0; block < kBlocks; ++block) {
      CHECK(start(block, group) == at, "block " + std::to_string(block) + " of group " + std::to_string(group));
      for (int64_t e = base; e < end; ++e) {
        const int32_t column = index.data()[e];
        if (column < 0 || column / kWidth != block) continue;
        const cuda::BlockEntry& found = entry.data()[base + at++];
        CHECK(found.e == e && found.column == column % kWidth && found.row == e / c.k % 16, std::to_string(e));
      }
    }
    CHECK(start(kBlocks, group) == at, "the end of group " + std::to_string(group));
  }
}

void the_chunk_must_be_whole_tiles() {
  Random random(6);
  const Problem<BFloat16> problem({130, 64, 16, 1}, random);
  const std::string error = error_of([&] { run_both<BFloat16, Small>(problem, 72); });
  CHECK(error == "linear_bwd: chunk: 72 tokens, expected whole tiles of 64", error);
}

// Transposed grad and the partial sums together, at every k, and never less than one tile of tokens.
void scratch_is_bounded() {
  constexpr cuda::Device kGpu{227 << 10, 132, 512, 32 << 20};
  for (int64_t k : {1, 20, 200}) {
    const cuda::LinearBwdScratch needed = cuda::linear_bwd_scratch(
        {DType::bf16, 16384, 4096, 4096, k, nullptr, 0, nullptr, 0, nullptr, nullptr, nullptr, 0}, kGpu);
    const int64_t bytes = 4096 * (2 * needed.chunk + 4 * k * needed.partials);
    CHECK(bytes <= 32 << 20 && bytes > 14 << 20, std::to_string(bytes));
    CHECK(needed.partials == needed.chunk / HopperBwdTile::kRows, std::to_string(needed.chunk));
  }
}

}  // namespace

int main() {
  both_hold_over_shapes();
  batches_of_any_length_hold();
  chunks_of_tokens_join();
  the_tile_of_the_gpu_holds();
  tiles_of_tokens_are_added_in_order();
  no_index_reaches_outside_the_arguments();
  values_that_are_not_finite_stay_where_they_belong();
  the_entries_of_a_block_are_those_of_its_columns();
  the_chunk_must_be_whole_tiles();
  scratch_is_bounded();
  return exit_status();
}
