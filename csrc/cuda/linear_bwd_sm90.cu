// out[t, c] = sum_j grad[t, j] weight[j, c] + sum over (j, s) with index[j, s] = c of delta[j, s] grad[t, j]
// grad_delta[j, s] = sum_t grad[t, j] x[t, index[j, s]]
#include "linear_bwd_sm90.h"

namespace neuroada::cuda {

LinearBwdScratch linear_bwd_scratch(const BypassBwdInput& p, const Device& device) {
  return linear_bwd_scratch_of<HopperBwdTile>(p, device);
}

void linear_bwd(const LinearBwd& p, const Device& device, void* stream) {
  run_linear_bwd<HopperBwdTile>(p, device, stream);
}

}  // namespace neuroada::cuda
