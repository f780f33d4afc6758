// With blocks of tokens that the hardware copies ahead, forward and SDDMM have the bits that they have without, but for
// SDDMM where a lane holds more slots; that, and dx, which sums in another order, have what the formula says.
#include <cmath>
#include <initializer_list>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/column_entries.cuh"
#include "cuda/launch.h"
#include "run_cuda.h"

using namespace neuroada::testing;
using neuroada::BFloat16;
using neuroada::Half;
using neuroada::cuda::Device;
namespace cuda = neuroada::cuda;

namespace {

// Room for a tile and a number of stages of `columns` columns, and for no more.
Device device_of(int64_t columns, int64_t stages, bool bulk_copies) {
  const int64_t quads = columns + 1 + 1 + stages * columns;
  return {quads * kQuad, 3, 32, 1 << 20, bulk_copies};
}

// How the hardware is asked for the blocks of a matrix: with no stages where it is not.
template <class T>
cuda::Tiles bulk_tiles(const Matrix<T>& matrix, const Device& device, bool cut) {
  const auto tiles =
      cuda::choose_tiles("test", matrix.data(), matrix.stride(), matrix.rows(), matrix.columns(), device);
  const auto copied = cut ? cuda::cut_for_bulk_copies<T> : cuda::with_bulk_copies<T>;
  return copied(tiles, matrix.data(), matrix.stride(), matrix.rows(), device);
}

// How many copies the hardware was asked for.
template <class F>
int64_t count_copies(F&& f) {
  const int64_t before = neuroada::host_cuda::bulk_copies;
  f();
  return neuroada::host_cuda::bulk_copies - before;
}
template <class F>
bool copies(F&& f) {
  return count_copies(f) > 0;
}

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
  // Where a lane holds more slots, tokens are shared out in another way.
  const bool all_slots = c.k > cuda::kFewHeld && c.k <= cuda::kMostHeld;
  CHECK(all_slots || found.grad_delta.same_bits(expected.grad_delta), where + ": other bits of grad_delta");
}

// Tokens below, at and above whole blocks, and so many blocks that stages take turns; rows next to and apart from one
// another; as many pairs a lane as there may be; real values, whose sums tell an order from another.
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

// More pairs of neurons than a CTA of 32 has lanes for: several a lane.
void many_neurons_give_the_same_bits() {
  for (int64_t k : {1, 2, 4, 8, 9}) check_case<BFloat16>({33, 48, 600, k, IndexKind::ragged, true}, 2, 7);
}

// In two tiles, of which one is transposed while the other is read: by two warps and by four, of few columns and of
// odd halves, of one block and of many, whose barriers take turns.
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
  // Each row comes in two halves.
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

// What the hardware does not copy, threads load: odd rows, rows that begin between 16 bytes, and a row too short.
void what_cannot_be_copied_is_loaded() {
  const auto check_loaded = [](const Case& c, int64_t stages) { check_case<BFloat16>(c, stages, 1, false); };
  check_loaded({33, 41, 67, 3, IndexKind::ragged}, 2);
  check_loaded({33, 40, 72, 3, IndexKind::ragged, false, Base::none, 4}, 2);
  check_loaded({33, 40, 72, 3, IndexKind::ragged, false, Base::none, 0, Values::grid, 1}, 2);
  check_loaded({33, 4, 12, 2, IndexKind::distinct}, 2);
}

// More neurons than a tile with room behind it can have: dx takes several, and keeps a column's sums from one to the
// next. Columns of more than one CTA, the last of them with few; a heavy column, and one that is heavy in one tile.
template <class T>
void check_tiles(const Case& c, int64_t width, uint64_t seed) {
  Random random(seed);
  const Problem<T> problem(c, random);
  const std::string where = std::string(dtype_name<T>()) + ", tiles of " + std::to_string(width) + ", " + c.name();
  const Device device = device_of(width, 1, true);
  CHECK(bulk_tiles(problem.grad, device, false).stages == 0, where + ": one tile holds all");
  CHECK(bulk_tiles(problem.grad, device, true).width == width, where + ": another width");
  check_outputs(run(problem, device), reference(problem), where);
}

void dx_takes_neurons_in_tiles() {
  uint64_t seed = 0;
  for (IndexKind index : {IndexKind::distinct, IndexKind::ragged, IndexKind::empty_rows, IndexKind::one_column}) {
    for (Base base : {Base::none, Base::separate}) {
      ++seed;
      check_tiles<BFloat16>({33, 40, 72, 3, index, false, base}, 40, seed);
      check_tiles<Half>({17, 64, 264, 2, index, false, base}, 64, seed);
    }
  }
  check_tiles<Half>({17, 600, 200, 4, IndexKind::distinct, false, Base::none, 8}, 64, 2);
  check_tiles<BFloat16>({17, 600, 200, 4, IndexKind::ragged}, 40, 3);
}

// Every other problem has some columns that are as many neurons' as all others together.
template <class T>
Problem<T> with_popular_columns(const Case& c, uint64_t seed) {
  Random random(seed);
  Problem<T> problem(c, random);
  for (int64_t j = 0; j < c.d_out && c.index == IndexKind::distinct && seed % 2 == 0; ++j) {
    problem.index(j, 0) = static_cast<int32_t>(j % 3 * (c.d_in / 3));
    for (int64_t s = 1; s < c.k; ++s) problem.index(j, s) = static_cast<int32_t>(c.d_in - s);
  }
  return problem;
}

// Columns whose sums wait where the tile was: in windows of as many as a tile has neurons at most, so that lanes have
// columns from anywhere. The very bits whatever CTAs there are, and where some columns are as many as all others
// together.
template <class T>
void check_windows(const Case& c, int64_t width, uint64_t seed, int64_t threads = 32) {
  const Problem<T> problem = with_popular_columns<T>(c, seed);
  const std::string where = std::string(dtype_name<T>()) + ", windows of " + std::to_string(width) + ", " + c.name();
  const auto device = [&](int64_t multiprocessors) {
    return Device{device_of(width, 1, true).shared_bytes, multiprocessors, threads, 1 << 20, true};
  };
  CHECK(bulk_tiles(problem.grad, device(1), false).stages == 0, where + ": one tile holds all");
  CHECK(bulk_tiles(problem.grad, device(1), true).width == width, where + ": another width");
  const Outputs<T> found = run(problem, device(1));
  if (c.values == Values::grid) check_outputs(found, reference(problem), where);
  Outputs<T> other = found;
  const Device more = device(seed % 2 == 0 ? 3 : 16);
  CHECK(copies([&] { run_bypass_bwd_input(problem, other, more); }), where + ": no copies");
  CHECK(found.grad_x.same_bits(other.grad_x), where + ": other bits");
}

// One window, several of a CTA, several CTAs; a last one of fewer columns; columns of no multiple of anything; rows
// that are written 8 bytes at a time and others; tokens below, at and above whole blocks; two tiles and three.
void dx_writes_columns_of_tiles_in_windows() {
  uint64_t seed = 0;
  for (int64_t d_in : {5, 64, 65, 333, 700}) {
    for (int64_t tokens : {1, 9, 16, 33}) {
      ++seed;
      Case c{tokens, d_in, seed % 3 == 1 ? 320 : 200, 3, static_cast<IndexKind>(seed % 4)};
      c.gap = seed % 3 == 0 ? 8 : 0;
      c.values = seed % 5 == 0 ? Values::real : Values::grid;
      if (seed % 5 < 3) {
        check_windows<BFloat16>(c, 128, seed, seed % 7 == 0 ? 64 : 32);
      } else {
        check_windows<Half>(c, 128, seed);
      }
    }
  }
  check_windows<BFloat16>({50, 700, 600, 8, IndexKind::distinct}, 320, 2);
  check_windows<BFloat16>({50, 260, 600, 9, IndexKind::ragged}, 320, 1);
  check_windows<BFloat16>({33, 830, 200, 20, IndexKind::distinct}, 128, 1, 64);
  check_windows<Half>({17, 600, 264, 5, IndexKind::distinct}, 64, 4, 96);
}

// Room for a tile of all neurons, a stage, and groups of `columns` columns that are written together.
Device device_with_groups(int64_t neurons, int64_t columns, int64_t multiprocessors = 3, int64_t threads = 32) {
  const int64_t quads = neurons + 1 + 1 + neurons + columns + 1;
  return {quads * kQuad, multiprocessors, threads, 1 << 20, true};
}

// A dx of which some columns are as many as all others together, and which has the very bits whatever CTAs there are.
template <class T>
void check_groups(const Case& c, int64_t columns, uint64_t seed, int64_t threads = 32) {
  const Problem<T> problem = with_popular_columns<T>(c, seed);
  const std::string where = std::string(dtype_name<T>()) + ", groups of " + std::to_string(columns) + ", " + c.name();
  const Device one = device_with_groups(c.d_out, columns, 1, threads);
  CHECK(bulk_tiles(problem.grad, one, false).stages >= 1, where + ": no stage");
  const Outputs<T> found = run(problem, one);
  if (c.values == Values::grid) check_outputs(found, reference(problem), where);
  for (int64_t multiprocessors : {3, 16}) {
    Outputs<T> other = found;
    run_bypass_bwd_input(problem, other, device_with_groups(c.d_out, columns, multiprocessors, threads));
    CHECK(found.grad_x.same_bits(other.grad_x), where + ": other bits");
  }
}

// One group, several, a last one of fewer columns or hardly any; columns of no multiple of anything; rows that are
// written 8 bytes at a time and others; tokens below, at and above whole blocks; rounds for some warps alone, of the
// only group or of the last.
void dx_writes_columns_in_groups() {
  uint64_t seed = 0;
  for (int64_t d_in : {5, 64, 65, 200, 333, 388}) {
    for (int64_t tokens : {1, 9, 16, 33}) {
      for (int64_t columns : {128, 200}) {
        ++seed;
        Case c{tokens, d_in, 72, 3, static_cast<IndexKind>(seed % 4)};
        c.gap = seed % 3 == 0 ? 8 : 0;
        c.values = seed % 5 == 0 ? Values::real : Values::grid;
        if (seed % 5 < 3) {
          check_groups<BFloat16>(c, columns, seed);
        } else {
          check_groups<Half>(c, columns, seed);
        }
      }
    }
  }
  check_groups<BFloat16>({130, 700, 200, 8, IndexKind::distinct}, 320, 2);
  check_groups<BFloat16>({50, 260, 600, 9, IndexKind::ragged}, 320, 1);
  check_groups<BFloat16>({33, 90, 72, 20, IndexKind::distinct}, 512, 1, 128);
  check_groups<BFloat16>({33, 830, 200, 20, IndexKind::distinct}, 256, 1, 64);
  check_groups<BFloat16>({40, 1500, 72, 1, IndexKind::distinct}, 512, 1, 64);  // most have no connections
  check_groups<Half>({40, 1500, 72, 1, IndexKind::distinct}, 512, 2, 64);
}

// In every form of dx: loaded, in one tile and in several; copied, in groups, also of few connections, in a whole tile
// without room behind it, and in tiles.
void orders_are_taken_at_their_word() {
  const Device loaded{64 << 10, 3, 32, 1 << 20}, several{1 << 10, 3, 32, 1 << 20};
  const Case dense{17, 100, 72, 8}, few{17, 200, 72, 1}, wide{17, 100, 264, 8};
  check_order_is_taken_at_its_word<float>(dense, loaded, "float32, loaded");
  check_order_is_taken_at_its_word<float>(wide, several, "float32, loaded in tiles");
  const auto in_16_bits = [&](auto element) {
    using T = decltype(element);
    const std::string name = dtype_name<T>();
    check_order_is_taken_at_its_word<T>(dense, loaded, name + ", loaded");
    check_order_is_taken_at_its_word<T>(wide, several, name + ", loaded in tiles");
    check_order_is_taken_at_its_word<T>(dense, device_with_groups(72, 128), name + ", groups");
    check_order_is_taken_at_its_word<T>(few, device_with_groups(72, 128), name + ", few in groups");
    check_order_is_taken_at_its_word<T>(dense, device_of(72, 1, true), name + ", whole");
    check_order_is_taken_at_its_word<T>(wide, device_of(64, 1, true), name + ", tiles");
  };
  in_16_bits(BFloat16{});
  in_16_bits(Half{});
}

// The gradient of the same problem, whose x lies so that it cannot be copied.
Matrix<float> loaded_sddmm(Case c, uint64_t seed, const Device& device) {
  Random random(seed);
  c.gap += 4;
  const Problem<BFloat16> problem(c, random);
  Matrix<float> out(0, 0);
  CHECK(!copies([&] { out = run_sddmm(problem, device); }), c.name() + ": is copied");
  return out;
}

// Whether x can be copied changes no bit, however many slots a lane holds and CTAs share the tokens.
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

// The columns of x that some neuron chose, and what the index calls them there; `more` of them that none chose.
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

// x as a layer keeps it, some of its columns, has the gradient of all of it: of an x in one tile, in several, and of
// one that no tile holds; kept in rows that can be copied, and in others.
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

// Of an x that fills a tile, with no room behind it, SDDMM of many slots takes columns in tiles, and has the very bits
// of one tile.
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

// An infinite grad meets no zeros that stand for another tile, and an infinite x only those that chose its column.
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

// To nearest, ties to even; what is no number stays none, and what is too large becomes infinite.
void a_packed_delta_is_rounded_once() {
  constexpr uint32_t kMask = 0xfff, kPlace = 0xabc;
  const auto packed = [](uint32_t bits) { return cuda::pack(kPlace, neuroada::float_from_bits(bits), kMask); };
  const std::pair<uint32_t, uint32_t> cases[] = {
      {0x3f800000, 0x3f800000}, {0x3f8007ff, 0x3f800000}, {0x3f800800, 0x3f800000}, {0x3f800801, 0x3f801000},
      {0x3f801800, 0x3f802000}, {0xbf801801, 0xbf802000}, {0x7f7fffff, 0x7f800000}, {0xff800000, 0xff800000},
      {0x00000801, 0x00001000}, {0x80000000, 0x80000000},
  };
  for (const auto& [bits, expected] : cases) CHECK(packed(bits) == (expected | kPlace), std::to_string(bits));
  for (uint32_t nan : {0x7fc00000u, 0x7fffffffu, 0xffffffffu, 0x7f800001u}) {
    CHECK(std::isnan(neuroada::float_from_bits(packed(nan) & ~kMask)), std::to_string(nan));
  }
}

}  // namespace

int main() {
  blocks_that_are_copied_give_the_same_bits();
  many_neurons_give_the_same_bits();
  what_cannot_be_copied_is_loaded();
  blocks_in_two_tiles_give_the_same_bits();
  dx_takes_neurons_in_tiles();
  dx_writes_columns_of_tiles_in_windows();
  dx_writes_columns_in_groups();
  orders_are_taken_at_their_word();
  an_x_that_cannot_be_copied_has_the_same_gradient();
  chosen_columns_have_the_gradient_of_all();
  sddmm_takes_columns_in_tiles();
  what_is_not_finite_stays_where_it_belongs();
  check_garbage_plans<BFloat16>({9, 21, 40, 2}, {"bulk copies", device_of(40, 2, true)});
  check_garbage_plans<BFloat16>({9, 21, 40, 2}, {"tiles of 24", device_of(24, 1, true)});
  check_garbage_plans<Half>({9, 200, 40, 2}, {"tiles of 16", device_of(16, 1, true)});
  check_garbage_plans<BFloat16>({9, 200, 40, 2}, {"groups of 128", device_with_groups(40, 128)});
  check_garbage_plans<BFloat16>({9, 400, 300, 2}, {"tiles of 128", device_of(128, 1, true)});
  a_packed_delta_is_rounded_once();
  return exit_status();
}
