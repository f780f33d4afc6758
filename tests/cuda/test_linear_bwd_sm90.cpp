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

}  // namespace

int main() {
  both_hold_over_shapes();
  batches_of_any_length_hold();
  chunks_of_tokens_join();
  the_tile_of_the_gpu_holds();
  return exit_status();
}
