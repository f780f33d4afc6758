// The kernels of bypass_bwd_input.cuh, bypass_bwd_input_groups.cuh and bypass_bwd_input_tiles.cuh with blocks that the
// hardware of sm_90a copies ahead.
#include "bypass_bwd_input_groups.cuh"
#include "bypass_bwd_input_tiles.cuh"
#include "launch.h"

namespace neuroada::cuda {

KernelOf<BypassBwdInputLaunch> bypass_bwd_input_bulk_kernel(const BypassBwdInput& p, BulkForm form) {
  KernelOf<BypassBwdInputLaunch> kernel = nullptr;
  with_element16("bypass_bwd_input", p.dtype, [&](auto element) {
    using T = decltype(element);
    kernel = form == BulkForm::groups  ? bypass_bwd_input_groups_kernel<T>
             : form == BulkForm::whole ? bypass_bwd_input_kernel<T, true, true>
                                       : bypass_bwd_input_tiles_kernel<T>;
  });
  return kernel;
}

}  // namespace neuroada::cuda
