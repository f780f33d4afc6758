// The kernels of sddmm.cuh with blocks that the hardware of sm_90a copies ahead.
#include "launch.h"
#include "sddmm.cuh"

namespace neuroada::cuda {

KernelOf<SddmmLaunch> sddmm_bulk_kernel(const Sddmm& p, const Device& device, bool whole) {
  KernelOf<SddmmLaunch> kernel = nullptr;
  with_element16("sddmm", p.dtype, [&](auto element) {
    with_held<kFewHeld>(p.d_out, p.k, true, device, [&](auto pairs, auto held) {
      using T = decltype(element);
      kernel = whole ? sddmm_kernel<T, pairs, held, true, true> : sddmm_kernel<T, pairs, held, false, true>;
    });
  });
  return kernel;
}

}  // namespace neuroada::cuda
