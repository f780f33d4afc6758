// out = from weight^T + bias, or out = from weight, with round(weight + delta) at the connections
#include "linear_patched_sm90.h"

namespace neuroada::cuda {

int64_t linear_patched_starts(int64_t d_in, int64_t d_out, bool forward) {
  return linear_patched_starts_of<HopperTile>(d_in, d_out, forward);
}

void linear_patched_fwd(const LinearPatched& p, const Device& device, void* stream) {
  run_linear_patched_fwd<HopperTile>(p, device, stream);
}

void linear_patched_bwd_input(const LinearPatched& p, const Device& device, void* stream) {
  run_linear_patched_bwd_input<HopperTile>(p, device, stream);
}

}  // namespace neuroada::cuda
