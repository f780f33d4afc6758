// The bypass of one slot on sm_90a, see bypass_fwd_rows.cuh.
#pragma once

#include "kernels.h"

namespace neuroada::cuda {

// Launches the kernel if it applies, and returns whether it did. The result has the same bits as any other kernel's.
bool bypass_fwd_rows(const BypassFwd&, const Device&, void* stream);

}  // namespace neuroada::cuda
