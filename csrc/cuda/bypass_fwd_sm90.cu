// The kernels of bypass_fwd.cuh with bulk-copied blocks (sm_90a).
#include "bypass_fwd.cuh"
#include "launch.h"

namespace neuroada::cuda {

KernelOf<BypassFwdLaunch> bypass_fwd_bulk_kernel(const BypassFwd& p, const Device& device, const Tiles& tiles) {
  KernelOf<BypassFwdLaunch> kernel = nullptr;
  with_element16("bypass_fwd", p.dtype, [&](auto element) {
    using T = decltype(element);
    with_held<kMostHeld>(p.d_out, p.k, false, device, [&](auto pairs, auto held) {
      kernel = tiles.count == 2 ? bypass_fwd_kernel<T, pairs, held, true, Staging::staggered>
                                : bypass_fwd_kernel<T, pairs, held, true, Staging::copied>;
    });
  });
  return kernel;
}

}  // namespace neuroada::cuda
