// The bypass of one slot on sm_90a, see bypass_fwd_rows.cuh.
#pragma once

#include "kernels.h"

namespace neuroada::cuda {

// Whether it was launched: where it is not for the problem, or the device, nothing is. Its bits are those of any other.
bool bypass_fwd_rows(const BypassFwd&, const Device&, void* stream);

}  // namespace neuroada::cuda
