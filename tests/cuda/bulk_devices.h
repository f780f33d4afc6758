// Devices for the tests of bulk-copied blocks, and counts of bulk copies.
#pragma once

#include "cuda/launch.h"
#include "run_cuda.h"

namespace neuroada::testing {

// A device with room for exactly a tile and a number of stages of `columns` columns.
inline cuda::Device device_of(int64_t columns, int64_t stages, bool bulk_copies) {
  const int64_t quads = columns + 1 + 1 + stages * columns;
  return {quads * kQuad, 3, 32, 1 << 20, bulk_copies};
}

// The tiles for the blocks of a matrix; without stages if they are not bulk-copied.
template <class T>
cuda::Tiles bulk_tiles(const Matrix<T>& matrix, const cuda::Device& device, bool cut) {
  const auto tiles =
      cuda::choose_tiles("test", matrix.data(), matrix.stride(), matrix.rows(), matrix.columns(), device);
  const auto copied = cut ? cuda::cut_for_bulk_copies<T> : cuda::with_bulk_copies<T>;
  return copied(tiles, matrix.data(), matrix.stride(), matrix.rows(), device);
}

// The number of bulk copies that f issues.
template <class F>
int64_t count_copies(F&& f) {
  const int64_t before = host_cuda::bulk_copies;
  f();
  return host_cuda::bulk_copies - before;
}
template <class F>
bool copies(F&& f) {
  return count_copies(f) > 0;
}

// A device with room for a tile of all neurons, a stage, and groups of `columns` columns that are written together.
inline cuda::Device device_with_groups(int64_t neurons, int64_t columns, int64_t multiprocessors = 3,
                                       int64_t threads = 32) {
  const int64_t quads = neurons + 1 + 1 + neurons + columns + 1;
  return {quads * kQuad, multiprocessors, threads, 1 << 20, true};
}

}  // namespace neuroada::testing
