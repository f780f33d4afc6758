// The kernels of bypass_fwd.cuh with blocks that the hardware of sm_90a copies ahead.
#include "bypass_fwd.cuh"
#include "launch.h"

namespace neuroada::cuda {

KernelOf<BypassFwdLaunch> bypass_fwd_bulk_kernel(const BypassFwd& p, const Device& device) {
  KernelOf<BypassFwdLaunch> kernel = nullptr;
  with_element16("bypass_fwd", p.dtype, [&](auto element) {
    with_held<kMostHeld>(p.d_out, p.k, false, device, [&](auto pairs, auto held) {
      kernel = bypass_fwd_kernel<decltype(element), pairs, held, true, true>;
    });
  });
  return kernel;
}

}  // namespace neuroada::cuda
