// The kernels of sddmm.cuh with bulk-copied blocks (sm_90a).
#include "launch.h"
#include "sddmm.cuh"

namespace neuroada::cuda {

KernelOf<SddmmLaunch> sddmm_bulk_kernel(const Sddmm& p, const Device& device, const Tiles& tiles) {
  KernelOf<SddmmLaunch> kernel = nullptr;
  with_element16("sddmm", p.dtype, [&](auto element) {
    using T = decltype(element);
    const auto of = [&](auto pairs, auto held) {
      kernel = tiles.count == 2 ? sddmm_kernel<T, pairs, held, true, Staging::staggered>
                                : sddmm_kernel<T, pairs, held, true, Staging::copied>;
    };
    if (!holds_all_slots(p.k)) return with_held<kFewHeld>(p.d_out, p.k, true, device, of);
    if (tiles.single()) return of(kNumber<1>, kNumber<kMostHeld>);
    kernel = sddmm_kernel<T, 1, kMostHeld, false, Staging::copied>;
  });
  return kernel;
}

}  // namespace neuroada::cuda
