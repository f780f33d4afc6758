// out[t, c] = sum_j grad[t, j] weight[j, c] + sum over (j, s) with index[j, s] = c of delta[j, s] grad[t, j]
//
// linear_sm90.cuh with W's rows along the sum, and the plan's connections of an input.
#include "linear_sm90.h"

namespace neuroada::cuda {

int64_t linear_bwd_input_chunk(const BypassBwdInput& p, const Device& device) {
  return choose_chunk<HopperTile>(p.tokens, 2 * p.d_out, p.d_in, device);
}

void linear_bwd_input(const LinearBwdInput& p, const Device& device, void* stream) {
  run_linear_bwd_input<HopperTile>(p, device, stream);
}

}  // namespace neuroada::cuda
