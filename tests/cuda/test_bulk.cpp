// With bulk-copied blocks of tokens, forward and SDDMM have the same bits as without, except SDDMM if a lane holds more
// slots, which matches the formula.
#include <limits>
#include <vector>

#include "bulk_devices.h"

using namespace neuroada::testing;
using neuroada::BFloat16;
using neuroada::Half;
using neuroada::cuda::Device;
namespace cuda = neuroada::cuda;

namespace {

template <class T>
void check_case(const Case& c, int64_t stages, uint64_t seed, bool copied = true) {
  Random random(seed);
  const Problem<T> problem(c, random);
  const int64_t columns = std::max(c.d_in, c.d_out);
  const std::string where = std::string(dtype_name<T>()) + ", stages " + std::to_string(stages) + ", " + c.name();
  const Device device = device_of(columns, stages, true), without = device_of(columns, stages, false);
  CHECK((bulk_tiles(problem.x, device, false).stages > 0) == copied, where + ": x");
  CHECK((bulk_tiles(problem.grad, device, false).stages > 0) == copied, where + ": grad");
  const Outputs<T> found = run(problem, device);
  if (c.values == Values::grid) check_outputs(found, reference(problem), where);
  Outputs<T> again = found;
  CHECK(copies([&] { run_bypass_fwd(problem, again, device); }) == copied, where + ": copies of the forward");
  CHECK(copies([&] { run_sddmm(problem, device); }) == copied, where + ": copies of SDDMM");
  CHECK(!copies([&] { run(problem, without); }), where + ": copies though there are none");
  const Outputs<T> expected = run(problem, without);
  CHECK(found.out.same_bits(expected.out), where + ": other bits of out");
  // If a lane holds more slots, tokens are partitioned differently.
  const bool all_slots = c.k > cuda::kFewHeld && c.k <= cuda::kMostHeld;
  CHECK(all_slots || found.grad_delta.same_bits(expected.grad_delta), where + ": other bits of grad_delta");
}

// Tokens below, at and above whole blocks, and so many blocks that stages are reused; rows with and without gaps; as
// many pairs per lane as possible; real values, whose sums depend on the order.
void blocks_that_are_copied_give_the_same_bits() {
  uint64_t seed = 0;
  for (int64_t stages : {1, 2}) {
    for (int64_t tokens : {1, 9, 16, 130}) {
      for (int64_t k : {1, 3, 8, 20}) {
        for (Values values : {Values::grid, Values::real}) {
          ++seed;
          Case c{tokens, 40, 72, k, static_cast<IndexKind>(seed % 4), seed % 3 == 0};
          c.base = static_cast<Base>(seed % 3);
          c.gap = seed % 2 == 0 ? 0 : 8;
          c.values = values;
          if (seed % 5 < 3) {
            check_case<BFloat16>(c, stages, seed);
          } else {
            check_case<Half>(c, stages, seed);
          }
        }
      }
    }
  }
}

// More pairs of neurons than a CTA of 32 threads has lanes: several pairs per lane.
void many_neurons_give_the_same_bits() {
  for (int64_t k : {1, 2, 4, 8, 9}) check_case<BFloat16>({33, 48, 600, k, IndexKind::ragged, true}, 2, 7);
}

// In double-buffered tiles: with two warps and four, with few columns and uneven halves, with one block and with many,
// for which barriers alternate their phases.
template <class T>
void check_two_tiles(const Case& c, int64_t threads, uint64_t seed) {
  Random random(seed);
  const Problem<T> problem(c, random);
  const std::string where = std::string(dtype_name<T>()) + ", two tiles, " + c.name();
  const int64_t quads = 2 * (c.d_in + 1) + 2 + c.d_in;
  Device device{quads * kQuad, 3, threads, 1 << 20, true};
  const Outputs<T> expected = run(problem, device);
  Outputs<T> found = make_outputs(problem);
  const auto forward = [&] { run_bypass_fwd(problem, found, device); };
  const auto sddmm = [&] { found.grad_delta = run_sddmm(problem, device); };
  const int64_t of_forward = count_copies(forward), of_sddmm = count_copies(sddmm);
  found = make_outputs(problem);
  device.two_tiles = true;
  const cuda::Tiles tiles = cuda::with_two_tiles(bulk_tiles(problem.x, device, false), device);
  CHECK(tiles.count == 2 && tiles.bytes() == device.shared_bytes, where + ": other tiles");
  // Each row is copied in two halves.
  CHECK(of_forward > 0 && count_copies(forward) == 2 * of_forward, where + ": other copies in the forward");
  CHECK(of_sddmm > 0 && count_copies(sddmm) == 2 * of_sddmm, where + ": other copies in SDDMM");
  CHECK(found.out.same_bits(expected.out), where + ": other bits of out");
  CHECK(found.grad_delta.same_bits(expected.grad_delta), where + ": other bits of grad_delta");
}

void blocks_in_two_tiles_give_the_same_bits() {
  uint64_t seed = 300;
  for (int64_t tokens : {1, 8, 9, 17, 130}) {
    for (int64_t k : {1, 3, 8, 20}) {
      for (int64_t d_in : {16, 40, 328}) {
        ++seed;
        if (k > d_in) continue;
        Case c{tokens, d_in, 72, k, static_cast<IndexKind>(seed % 4), seed % 3 == 0};
        c.base = static_cast<Base>(seed % 3);
        c.values = Values::real;
        const int64_t threads = seed % 2 == 0 ? 64 : 128;
        if (seed % 5 < 3) {
          check_two_tiles<BFloat16>(c, threads, seed);
        } else {
          check_two_tiles<Half>(c, threads, seed);
        }
      }
    }
  }
  for (int64_t k : {2, 4, 8, 9}) check_two_tiles<BFloat16>({33, 48, 1200, k, IndexKind::ragged, true}, 64, 7);
  const Device wide{4 << 10, 3, 64, 1 << 20, true, true}, narrow{4 << 10, 3, 32, 1 << 20, true, true};
  const Matrix<BFloat16> some(4, 16), few(4, 8), many(4, 104);
  const auto count = [](const Matrix<BFloat16>& x, const Device& device) {
    return cuda::with_two_tiles(bulk_tiles(x, device, false), device).count;
  };
  CHECK(count(some, wide) == 2 && count(some, narrow) == 1 && count(few, wide) == 1 && count(many, wide) == 1,
        "two tiles where there are not two of the warps, the columns or the rooms");
}

// Threads load what cannot be bulk-copied: odd rows, rows that are not 16-byte aligned, and a row too short.
void what_cannot_be_copied_is_loaded() {
  const auto check_loaded = [](const Case& c, int64_t stages) { check_case<BFloat16>(c, stages, 1, false); };
  check_loaded({33, 41, 67, 3, IndexKind::ragged}, 2);
  check_loaded({33, 40, 72, 3, IndexKind::ragged, false, Base::none, 4}, 2);
  check_loaded({33, 40, 72, 3, IndexKind::ragged, false, Base::none, 0, Values::grid, 1}, 2);
  check_loaded({33, 4, 12, 2, IndexKind::distinct}, 2);
}

// The gradient of the same problem with an x whose layout cannot be bulk-copied.
Matrix<float> loaded_sddmm(Case c, uint64_t seed, const Device& device) {
  Random random(seed);
  c.gap += 4;
  const Problem<BFloat16> problem(c, random);
  Matrix<float> out(0, 0);
  CHECK(!copies([&] { out = run_sddmm(problem, device); }), c.name() + ": is copied");
  return out;
}

// Whether x can be bulk-copied changes no bit, for any number of slots per lane and of CTAs that share the tokens.
void an_x_that_cannot_be_copied_has_the_same_gradient() {
  uint64_t seed = 100;
  for (int64_t k : {1, 8, 9, 16, 20, 21, 40}) {
    for (int64_t d_out : {72, 300}) {
      ++seed;
      Case c{130, 40, d_out, k, IndexKind::ragged};
      c.values = Values::real;
      Random random(seed);
      const Problem<BFloat16> problem(c, random);
      const Device device{64 << 10, 7, 32, 1 << 20, true};
      CHECK(run_sddmm(problem, device).same_bits(loaded_sddmm(c, seed, device)), c.name() + ": other bits");
    }
  }
}

// The problem with only the chosen columns of x, renumbered in the index, and `more` columns that no neuron chose.
Problem<BFloat16> of_chosen_columns(const Problem<BFloat16>& whole, int64_t more) {
  std::vector<int32_t> renamed(static_cast<size_t>(whole.shape.d_in), -1);
  Problem<BFloat16> chosen = whole;
  int32_t count = 0;
  whole.each_connection([&](int64_t, int64_t, int64_t column) {
    int32_t& name = renamed[static_cast<size_t>(column)];
    if (name < 0) name = count++;
  });
  chosen.shape.d_in = count + more;
  chosen.x = Matrix<BFloat16>(whole.shape.tokens, chosen.shape.d_in);
  for (int64_t t = 0; t < whole.shape.tokens; ++t) {
    for (int64_t c = 0; c < chosen.shape.d_in; ++c) neuroada::narrow(0.0f, chosen.x(t, c));
    for (int64_t c = 0; c < whole.shape.d_in; ++c) {
      const int32_t name = renamed[static_cast<size_t>(c)];
      if (name >= 0) chosen.x(t, name) = whole.x(t, c);
    }
  }
  for (int64_t j = 0; j < whole.shape.d_out; ++j) {
    for (int64_t s = 0; s < whole.shape.k; ++s) {
      const int32_t column = whole.index(j, s);
      chosen.index(j, s) = column < 0 ? -1 : renamed[static_cast<size_t>(column)];
    }
  }
  return chosen;
}

// The chosen columns of x, as a layer saves them, give the gradient of the whole x: of an x in one tile, in several,
// and too wide for any; saved in rows that can be bulk-copied, and in others.
void chosen_columns_have_the_gradient_of_all() {
  uint64_t seed = 200;
  for (int64_t quads : {500, 210, 150}) {
    for (int64_t k : {1, 8, 9, 20, 21}) {
      for (int64_t more : {0, 1, 2, 3, 4, 5, 6, 7}) {
        ++seed;
        Random random(seed);
        Case c{41, 200, more % 2 == 0 ? 20 : 5, k, IndexKind::distinct};
        if (k > 1 && c.d_out * k > 140) c.d_out = 3;
        c.values = Values::real;
        const Problem<BFloat16> whole(c, random);
        const Problem<BFloat16> chosen = of_chosen_columns(whole, more);
        const Device device{quads * kQuad, 7, 32, 1 << 20, true};
        const std::string where = "quads " + std::to_string(quads) + ", " + chosen.shape.name();
        CHECK(run_sddmm(chosen, device, c.d_in).same_bits(run_sddmm(whole, device)), where + ": other bits");
      }
    }
  }
}

// If x fills a tile and leaves no room for a stage, SDDMM of many slots uses several tiles, and has the same bits as
// with one.
void sddmm_takes_columns_in_tiles() {
  struct Wide {
    int64_t d_in, quads, width;
  };
  uint64_t seed = 0;
  for (const Wide& wide : {Wide{72, 100, 40}, Wide{200, 210, 64}, Wide{64, 65, 24}, Wide{120, 126, 40}}) {
    for (int64_t k : {9, 16, 20}) {
      ++seed;
      Random random(seed);
      Case c{41, wide.d_in, seed % 2 == 0 ? 72 : 300, k, static_cast<IndexKind>(seed % 4)};
      c.values = Values::real;
      const Problem<BFloat16> problem(c, random);
      const Device device{wide.quads * kQuad, 3, 32, 1 << 20, true};
      const std::string where = "quads " + std::to_string(wide.quads) + ", " + c.name();
      CHECK(bulk_tiles(problem.x, device, false).stages == 0, where + ": one tile has room behind it");
      CHECK(bulk_tiles(problem.x, device, true).width == wide.width, where + ": another width");
      CHECK(copies([&] { run_sddmm(problem, device); }), where + ": no copies");
      CHECK(run_sddmm(problem, device).same_bits(loaded_sddmm(c, seed, device)), where + ": other bits");
    }
  }
}

// An infinite grad is not multiplied by zeros that stand for another tile, and an infinite x only affects neurons that
// chose its column.
void what_is_not_finite_stays_where_it_belongs() {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const Device devices[] = {device_of(72, 2, true),
                            {100 * kQuad, 3, 32, 1 << 20, true},
                            device_of(40, 1, true),
                            device_of(64, 1, true),
                            device_with_groups(72, 128)};
  for (const Device& device : devices) {
    for (IndexKind index : {IndexKind::distinct, IndexKind::ragged}) {
      Random random(4);
      Problem<BFloat16> problem({33, 72, 72, 3, index}, random);
      for (int64_t j = 0; j < 72; j += 5) neuroada::narrow(j % 2 ? kInf : -kInf, problem.grad(j % 33, j));
      for (int64_t c = 0; c < 72; c += 7) neuroada::narrow(c % 2 ? kInf : -kInf, problem.x(c % 33, c));
      const std::string where = std::to_string(device.shared_bytes) + " bytes, " + problem.shape.name();
      check_outputs(run(problem, device), reference(problem), where);
    }
  }
}

}  // namespace

int main() {
  blocks_that_are_copied_give_the_same_bits();
  many_neurons_give_the_same_bits();
  blocks_in_two_tiles_give_the_same_bits();
  what_cannot_be_copied_is_loaded();
  an_x_that_cannot_be_copied_has_the_same_gradient();
  chosen_columns_have_the_gradient_of_all();
  sddmm_takes_columns_in_tiles();
  what_is_not_finite_stays_where_it_belongs();
  return exit_status();
}
