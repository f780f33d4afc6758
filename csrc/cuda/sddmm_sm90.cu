// The kernels of sddmm.cuh with blocks that the hardware of sm_90a copies ahead.
#include "launch.h"
#include "sddmm.cuh"

namespace neuroada::cuda {

KernelOf<SddmmLaunch> sddmm_bulk_kernel(const Sddmm& p, const Device& device, bool whole) {
  KernelOf<SddmmLaunch> kernel = nullptr;
  with_element16("sddmm", p.dtype, [&](auto element) {
    using T = decltype(element);
    if (holds_all_slots(p.k)) {
      kernel = whole ? sddmm_kernel<T, 1, kMostHeld, true, true> : sddmm_kernel<T, 1, kMostHeld, false, true>;
      return;
    }
    with_held<kFewHeld>(p.d_out, p.k, true, device,
                        [&](auto pairs, auto held) { kernel = sddmm_kernel<T, pairs, held, true, true>; });
  });
  return kernel;
}

}  // namespace neuroada::cuda
