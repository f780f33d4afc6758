// For launchers of kernels on a circular buffer of rows: the partition of neurons and tokens, and the buffer.
#pragma once

#include "launch.h"
#include "row_ring.cuh"

namespace neuroada::cuda {

// Groups of 8 neurons per lane, and threads per CTA. One CTA takes all neurons, as far as registers allow, so that x is
// read once.
struct RowsForm {
  int64_t groups, threads;

  Shares share_out(int64_t d_out, int64_t tokens, const Device& device) const {
    return cuda::share_out(d_out, groups * kGroup * threads, ceil_div(tokens, kTokens<BFloat16>), 1, device);
  }
};

// Whether 16 bits can index the columns, and the neurons give at least half of the lanes work.
inline bool suits_rows(int64_t d_in, int64_t d_out, const Device& device) {
  return device.bulk_copies && d_in > 0 && d_in <= UINT16_MAX && 2 * d_out >= kGroup * device.threads;
}

// The most rows per stage that leave `few` stages, of which one is read while the others are in flight. Fewer than two
// stages if two rows do not fit.
template <class T>
Ring choose_ring(int64_t width, int64_t second_width, int64_t few, const Device& device) {
  constexpr int64_t kMostRows = 8;
  Ring ring{0, 0, static_cast<int32_t>(width), static_cast<int32_t>(second_width)};
  const int64_t fit = (device.shared_bytes - Ring::kBarrierBytes) / (ring.row() * static_cast<int64_t>(sizeof(T)));
  ring.rows = static_cast<int32_t>(std::clamp<int64_t>(fit / few, 1, kMostRows));
  ring.stages = static_cast<int32_t>(std::clamp<int64_t>(fit / ring.rows, 0, kRingStages));
  return ring;
}

}  // namespace neuroada::cuda
