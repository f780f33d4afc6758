// GEMMs for sm_90a with tiles of W patched in shared memory give the same bits as with a weight patched in memory. With
// tiles so small that few tokens fill many of them, and with the tile that a GPU runs. Sums of grid values are exact:
// outputs are compared for equality.
#include "cuda/linear_patched_sm90.h"
#include "run_cuda.h"

using namespace neuroada;
using namespace neuroada::testing;
using cuda::HopperTile;
using cuda::ProductTile;

namespace {

using Narrow = ProductTile<1, 32, 2>;  // fewer columns than a swizzled row has
using Small = ProductTile<1, 64, 2>;   // one block of 64 rows of W
using Two = ProductTile<2, 64, 3>;     // two consumers, and a number of stages that is no power of two

constexpr cuda::Device kDevice{0, 2, 64, 1 << 20};

// The same problem with round(W + delta) in the weight, and without connections.
template <class T>
Problem<T> patched(const Problem<T>& p) {
  Problem<T> q = p;
  p.each_connection([&](int64_t j, int64_t s, int64_t column) {
    narrow(widen(p.weight(j, column)) + p.delta(j, s), q.weight(j, column));
    q.index(j, s) = -1;
  });
  return q;
}

// The tile of the GPU runs through the entry points that a GPU has.
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
    kOfGpu ? cuda::linear_patched_fwd(args, kDevice, nullptr)
           : cuda::run_linear_patched_fwd<Tile>(args, kDevice, nullptr);
  } else {
    kOfGpu ? cuda::linear_patched_bwd_input(args, kDevice, nullptr)
           : cuda::run_linear_patched_bwd_input<Tile>(args, kDevice, nullptr);
  }
  return out;
}

template <class Tile>
std::string describe(const char* kernel, const char* dtype, const Case& c) {
  return std::string(kernel) + " " + dtype + ", " + std::to_string(Tile::kRows) + " x " +
         std::to_string(Tile::kColumns) + ", " + std::to_string(Tile::kStages) + " stages, " + c.name();
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

// Sizes around the edges of a tile: rows, columns and depth below, at and above it, where a size is not restricted; the
// shortest sum, and sums longer than the circular buffer.
void forward_holds_over_shapes() {
  check_fwd<BFloat16, Narrow>({1, 8, 1, 1});
  check_fwd<BFloat16, Narrow>({63, 64, 31, 1, IndexKind::distinct, true});
  check_fwd<Half, Narrow>({65, 72, 33, 3, IndexKind::ragged, true, Base::none, 8});
  check_fwd<BFloat16, Narrow>({64, 128, 32, 8});
  check_fwd<BFloat16, Two>({129, 264, 65, 5, IndexKind::ragged, true}, 7);
  check_fwd<Half, Two>({100, 72, 40, 1, IndexKind::one_column, false, Base::none, 16}, 3);
}

void backward_holds_over_shapes() {
  check_bwd<BFloat16, Small>({1, 8, 8, 1});
  check_bwd<Half, Small>({63, 56, 64, 2, IndexKind::ragged});
  check_bwd<BFloat16, Two>({129, 136, 264, 3, IndexKind::empty_rows, false, Base::none, 8}, 8);
  check_bwd<Half, Two>({100, 40, 72, 1, IndexKind::one_column, false, Base::none, 16}, 3);
}

// More connections of a group in a piece than its threads hold in registers.
void pieces_of_many_connections_hold() {
  check_fwd<Half, Small>({70, 72, 40, 72, IndexKind::ragged});
  check_bwd<BFloat16, Small>({9, 72, 48, 72, IndexKind::ragged});
}

// Sums longer than its circular buffer, both of its consumers, and all blocks of W's rows.
void the_tile_of_the_gpu_holds() {
  check_fwd<BFloat16, HopperTile>({100, 328, 296, 9, IndexKind::ragged, true});
  check_bwd<Half, HopperTile>({100, 328, 248, 9, IndexKind::ragged});
}

// Real values, whose sums round differently in another order.
void runs_repeat_to_the_bit() {
  Random random(3);
  const Problem<Half> p({70, 72, 40, 5, IndexKind::ragged, true, Base::none, 0, Values::real}, random);
  CHECK((run_patched<Half, Two, true>(p).same_bits(run_patched<Half, Two, true>(p))), "linear_patched_fwd");
  CHECK((run_patched<Half, Two, false>(p).same_bits(run_patched<Half, Two, false>(p))), "linear_patched_bwd_input");
}

// A product of 1 + 2^-12 plus a bias of 256 is 258 in bfloat16, but 256 if the product is rounded first.
void the_sum_is_rounded_once() {
  Random random(4);
  Problem<BFloat16> p({8, 8, 32, 1, IndexKind::one_column, true}, random);
  for (int64_t j = 0; j < 32; ++j) {
    narrow(256.0f, p.bias(0, j));
    p.delta(j, 0) = 0x1p-12f;
    for (int64_t c = 0; c < 8; ++c) narrow(c == 1 ? 1.0f : 0.0f, p.weight(j, c));
  }
  for (int64_t t = 0; t < 8; ++t) {
    for (int64_t c = 0; c < 8; ++c) narrow(1.0f, p.x(t, c));
  }
  check_rounded(run_patched<BFloat16, Narrow, true>(p), reference(patched(p)).linear, "rounded once");
}

// A column out of range is a slot without a connection.
void no_index_reaches_outside_the_arguments() {
  Random random(5);
  Problem<BFloat16> p({9, 72, 40, 2}, random);
  Problem<BFloat16> without = p;
  for (int64_t j = 0; j < 40; ++j) {
    const int32_t strange[] = {72, -2, 1 << 30, INT32_MIN, 127};
    without.index(j, j % 2) = -1;
    p.index(j, j % 2) = strange[j % 5];
  }
  const Outputs<double> expected = reference(patched(without));
  check_rounded(run_patched<BFloat16, Small, true>(p), expected.linear, "columns out of range");
  check_rounded(run_patched<BFloat16, Small, false>(p), expected.linear_grad_x, "columns out of range, dx");
}

void the_entries_of_a_block_are_those_of_its_columns() {
  constexpr int64_t kWidth = 64, kGroups = 3, kBlocks = 4;
  Random random(6);
  const Case c{1, 200, 40, 5, IndexKind::ragged};
  const Matrix<int32_t> index = make_index(c, random);
  Matrix<int32_t> start(kBlocks + 1, kGroups);
  Matrix<cuda::BlockEntry> entry(c.d_out, c.k);
  cuda::block_entries({c.d_in, c.d_out, c.k, kWidth, index.data(), start.data(), entry.data()}, kDevice, nullptr);
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

void what_the_copies_cannot_take_is_refused() {
  const auto error = [](const Case& c) -> std::string {
    Random random(7);
    try {
      run_patched<BFloat16, Narrow, true>(Problem<BFloat16>(c, random));
    } catch (const std::runtime_error& error) {
      return error.what();
    }
    return "no error";
  };
  const auto refused = [&](const Case& c, const std::string& why) {
    CHECK(error(c) == "linear_patched_fwd: x: " + why, error(c));
  };
  refused({8, 12, 16, 1}, "12 columns, expected a multiple of 8");
  refused({8, 16, 16, 1, IndexKind::distinct, false, Base::none, 4}, "stride 20, expected a multiple of 8");
  refused({8, 16, 16, 1, IndexKind::distinct, false, Base::none, 0, Values::grid, 4}, "not 16-byte aligned");
}

}  // namespace

int main() {
  forward_holds_over_shapes();
  backward_holds_over_shapes();
  pieces_of_many_connections_hold();
  the_tile_of_the_gpu_holds();
  runs_repeat_to_the_bit();
  the_sum_is_rounded_once();
  no_index_reaches_outside_the_arguments();
  the_entries_of_a_block_are_those_of_its_columns();
  what_the_copies_cannot_take_is_refused();
  return exit_status();
}
