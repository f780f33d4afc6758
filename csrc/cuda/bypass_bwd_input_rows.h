// dx of one slot on sm_90a, see bypass_bwd_input_rows.cuh.
#pragma once

#include "kernels.h"

namespace neuroada::cuda {

// Whether it was launched: then it says in `served` whether it has written out.
bool bypass_bwd_input_rows(const BypassBwdInput&, int32_t* served, const Device&, void* stream);

}  // namespace neuroada::cuda
