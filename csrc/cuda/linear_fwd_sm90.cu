// out[t, j] = sum_c x[t, c] weight[j, c] + bias[j] + sum_s delta[j, s] x[t, index[j, s]]
//
// linear_sm90.cuh with rows of W as they lie, and the slots of a neuron as its connections.
#include "linear_sm90.h"

namespace neuroada::cuda {

int64_t linear_fwd_chunk(const BypassFwd& p, const Device& device) {
  return choose_chunk<HopperTile>(p.tokens, 2 * p.d_in, p.d_out, device);
}

void linear_fwd(const LinearFwd& p, const Device& device, void* stream) {
  run_linear_fwd<HopperTile>(p, device, stream);
}

}  // namespace neuroada::cuda
