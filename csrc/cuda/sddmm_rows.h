// SDDMM of one slot on sm_90a: when it applies, and its launcher. See sddmm_rows.cuh.
#pragma once

#include "kernels.h"

namespace neuroada::cuda {

// Number of token parts that are summed separately, or 0 if another kernel is used. Depends on the dtype, the sizes and
// the device, not on the layout of x and grad: the same values give the same bits.
int64_t sddmm_rows_parts(const Sddmm&, const Device&);

// Writes partial [parts, d_out, k], or [d_out, k] if there is one part.
void sddmm_rows(const Sddmm&, float* partial, const Device&, void* stream);

}  // namespace neuroada::cuda
