// What the launchers of kernels with a ring of rows share: how neurons and tokens are shared out, and the ring.
#pragma once

#include "launch.h"
#include "row_ring.cuh"

namespace neuroada::cuda {

// Groups of 8 neurons that a lane has, and threads. All neurons are one CTA's, as far as there are the registers for
// it, so that x is read once.
struct RowsForm {
  int64_t groups, threads;

  Shares share_out(int64_t d_out, int64_t tokens, const Device& device) const {
    return cuda::share_out(d_out, groups * kGroup * threads, ceil_div(tokens, kTokens<BFloat16>), 1, device);
  }
};

// Whether so few columns can be named by 16 bits, and so many neurons give half of the lanes work at least.
inline bool suits_rows(int64_t d_in, int64_t d_out, const Device& device) {
  return device.bulk_copies && d_in > 0 && d_in <= UINT16_MAX && 2 * d_out >= kGroup * device.threads;
}

// As many rows a stage as leave `few` stages, of which one is read while the others are on their way. Fewer than two
// where no two rows fit.
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
