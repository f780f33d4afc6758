// The products for sm_90a whose tiles of W are patched in shared memory are those of a weight that was patched
// in memory: the same rounding, the same bits.
#include "cuda/linear_patched_sm90.h"
#include "run_linear.h"

using namespace neuroada;
using namespace neuroada::testing;
using cuda::HopperTile;
using cuda::ProductTile;

namespace {

using Narrow = ProductTile<1, 32, 2>;
using Small = ProductTile<1, 64, 2>;
using Two = ProductTile<2, 64, 3, 32>;

// The problem of a layer whose weight holds round(W + delta), and that has no connection.
template <class T>
Problem<T> patched(const Problem<T>& p) {
  Problem<T> q = p;
  p.each_connection([&](int64_t j, int64_t s, int64_t column) {
    narrow(widen(p.weight(j, column)) + p.delta(j, s), q.weight(j, column));
    q.index(j, s) = -1;
  });
  return q;
}

template <class T, class Tile, bool kForward>
Matrix<T> run_patched(const Problem<T>& p, int64_t out_gap = 0) {
  const Case& c = p.shape;
  const Matrix<T>& from = kForward ? p.x : p.grad;
  Matrix<T> out(c.tokens, kForward ? c.d_out : c.d_in, out_gap);
  Matrix<int32_t> start(1, cuda::linear_patched_starts_of<Tile>(c.d_in, c.d_out, kForward));
  Matrix<cuda::BlockEntry> entry(c.d_out, c.k);
  const cuda::LinearPatched args{dtype_of<T>(),
                                 c.tokens,
                                 c.d_in,
                                 c.d_out,
                                 c.k,
                                 from.data(),
                                 from.stride(),
                                 p.weight.data(),
                                 p.weight.stride(),
                                 p.index.data(),
                                 p.delta.data(),
                                 kForward ? bias_of(p) : nullptr,
                                 start.data(),
                                 entry.data(),
                                 out.data(),
                                 out.stride()};
  constexpr bool kOfGpu = std::is_same_v<Tile, HopperTile>;
  if constexpr (kForward) {
    kOfGpu ? cuda::linear_patched_fwd(args, kLinearDevice, nullptr)
           : cuda::run_linear_patched_fwd<Tile>(args, kLinearDevice, nullptr);
  } else {
    kOfGpu ? cuda::linear_patched_bwd_input(args, kLinearDevice, nullptr)
           : cuda::run_linear_patched_bwd_input<Tile>(args, kLinearDevice, nullptr);
  }
  return out;
}

template <class T, class Tile>
void check_fwd(const Case& c, int64_t out_gap = 0) {
  Random random(1);
  const Problem<T> p(c, random);
  const Matrix<T> out = run_patched<T, Tile, true>(p, out_gap);
  check_rounded(out, reference(patched(p)).linear, describe<Tile>("linear_patched_fwd", dtype_name<T>(), c));
}

template <class T, class Tile>
void check_bwd(const Case& c, int64_t out_gap = 0) {
  Random random(2);
  const Problem<T> p(c, random);
  const Matrix<T> out = run_patched<T, Tile, false>(p, out_gap);
  check_rounded(out, reference(patched(p)).linear_grad_x,
                describe<Tile>("linear_patched_bwd_input", dtype_name<T>(), c));
}

// Sizes round the edges of a tile, and sums longer than the ring; up to more connections of a group in a piece
// than its threads hold ahead.
void both_hold_over_shapes() {
  check_fwd<BFloat16, Narrow>({1, 8, 1, 1});
  check_fwd<Half, Narrow>({65, 72, 33, 3, IndexKind::ragged, true, Base::none, 8});
  check_fwd<BFloat16, Two>({129, 264, 65, 5, IndexKind::ragged, true}, 7);
  check_fwd<Half, Small>({70, 72, 40, 72, IndexKind::ragged});
  check_bwd<Half, Small>({63, 56, 64, 2, IndexKind::ragged});
  check_bwd<BFloat16, Two>({129, 136, 264, 3, IndexKind::empty_rows, false, Base::none, 8}, 8);
  check_bwd<BFloat16, Small>({9, 72, 48, 72, IndexKind::ragged});
}

void the_tile_of_the_gpu_holds() {
  check_fwd<BFloat16, HopperTile>({40, 328, 296, 9, IndexKind::ragged, true});
  check_bwd<Half, HopperTile>({40, 328, 248, 9, IndexKind::ragged});
}

// A column out of range is a slot without a connection.
void no_index_reaches_outside_the_arguments() {
  Random random(3);
  Problem<BFloat16> p({9, 72, 40, 2}, random);
  Problem<BFloat16> without = p;
  for (int64_t j = 0; j < 40; ++j) {
    const int32_t strange[] = {72, -2, 1 << 30, INT32_MIN, 127};
    without.index(j, j % 2) = -1;
    p.index(j, j % 2) = strange[j % 5];
  }
  check_rounded(run_patched<BFloat16, Small, true>(p), reference(patched(without)).linear, "columns out of range");
}

}  // namespace

int main() {
  both_hold_over_shapes();
  the_tile_of_the_gpu_holds();
  no_index_reaches_outside_the_arguments();
  return exit_status();
}
