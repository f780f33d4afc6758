// The kernels of sddmm.cuh with blocks that the hardware of sm_90a copies ahead.
#include "launch.h"
#include "sddmm.cuh"

namespace neuroada::cuda {
namespace {

template <class T, int kPairs, int kHeld>
KernelOf<SddmmLaunch> kernel_of(bool whole) {
  return whole ? sddmm_kernel<T, kPairs, kHeld, true, true> : sddmm_kernel<T, kPairs, kHeld, false, true>;
}

}  // namespace

KernelOf<SddmmLaunch> sddmm_bulk_kernel(const Sddmm& p, const Device& device, bool whole) {
  KernelOf<SddmmLaunch> kernel = nullptr;
  with_element16("sddmm", p.dtype, [&](auto element) {
    using T = decltype(element);
    if (holds_all_slots(p.k)) {
      kernel = kernel_of<T, 1, kMostHeld>(whole);
      return;
    }
    with_held<kFewHeld>(p.d_out, p.k, true, device,
                        [&](auto pairs, auto held) { kernel = kernel_of<T, pairs, held>(whole); });
  });
  return kernel;
}

}  // namespace neuroada::cuda
