// dx with bulk-copied blocks of tokens, in all its forms: it sums in another order than without, and matches the
// formula.
#include <cmath>
#include <utility>

#include "bulk_devices.h"
#include "cuda/column_entries.cuh"

using namespace neuroada::testing;
using neuroada::BFloat16;
using neuroada::Half;
using neuroada::cuda::Device;
namespace cuda = neuroada::cuda;

namespace {

// More neurons than one tile beside a stage can have: dx uses several, and keeps a column's sums across them. Columns
// of several CTAs, the last with few; a heavy column, and one that is heavy in one tile only.
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

// In every other problem some columns are chosen as often as all others together.
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

// Sums that are written through the memory of the tile, in windows of at most as many columns as a tile has neurons, so
// that lanes may have any column of a window. The same bits for any number of CTAs, also if some columns are chosen as
// often as all others together.
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

// One window, several per CTA, several CTAs; a last one of fewer columns; numbers of columns that are no multiple of
// anything; rows that are written 8 bytes at a time and others; tokens below, at and above whole blocks; two tiles and
// three.
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

// Groups, also if some columns are chosen as often as all others together: the same bits for any number of CTAs.
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

// One group, several, a last one of fewer columns or hardly any; numbers of columns that are no multiple of anything;
// rows that are written 8 bytes at a time and others; tokens below, at and above whole blocks; fewer rounds than warps,
// in the only group or in the last.
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
  check_groups<BFloat16>({40, 1500, 72, 1, IndexKind::distinct}, 512, 1, 64);  // most columns have no connections
  check_groups<Half>({40, 1500, 72, 1, IndexKind::distinct}, 512, 2, 64);
}

// In every form of dx: loaded, in one tile and in several; bulk-copied, in groups, also with few connections, in one
// tile without room for sums, and in several tiles.
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

// To nearest, ties to even; NaN stays NaN, and overflow becomes infinite.
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
  dx_takes_neurons_in_tiles();
  dx_writes_columns_of_tiles_in_windows();
  dx_writes_columns_in_groups();
  orders_are_taken_at_their_word();
  check_garbage_plans<BFloat16>({9, 21, 40, 2}, {"bulk copies", device_of(40, 2, true)});
  check_garbage_plans<BFloat16>({9, 21, 40, 2}, {"tiles of 24", device_of(24, 1, true)});
  check_garbage_plans<Half>({9, 200, 40, 2}, {"tiles of 16", device_of(16, 1, true)});
  check_garbage_plans<BFloat16>({9, 200, 40, 2}, {"groups of 128", device_with_groups(40, 128)});
  check_garbage_plans<BFloat16>({9, 400, 300, 2}, {"tiles of 128", device_of(128, 1, true)});
  a_packed_delta_is_rounded_once();
  return exit_status();
}
