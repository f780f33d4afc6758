// The kernels of bypass_bwd_input.cuh, bypass_bwd_input_groups.cuh and bypass_bwd_input_tiles.cuh with bulk-copied
// blocks (sm_90a).
#include "bypass_bwd_input_groups.cuh"
#include "bypass_bwd_input_tiles.cuh"
#include "launch.h"

namespace neuroada::cuda {

KernelOf<BypassBwdInputLaunch> bypass_bwd_input_bulk_kernel(const BypassBwdInput& p, BulkForm form) {
  KernelOf<BypassBwdInputLaunch> kernel = nullptr;
  with_element16("bypass_bwd_input", p.dtype, [&](auto element) {
    using T = decltype(element);
    switch (form) {
      case BulkForm::groups: kernel = bypass_bwd_input_groups_kernel<T, false>; break;
      case BulkForm::sparse_groups: kernel = bypass_bwd_input_groups_kernel<T, true>; break;
      case BulkForm::whole: kernel = bypass_bwd_input_kernel<T, true, true>; break;
      case BulkForm::tiles: kernel = bypass_bwd_input_tiles_kernel<T>; break;
    }
  });
  return kernel;
}

}  // namespace neuroada::cuda
