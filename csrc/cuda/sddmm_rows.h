// SDDMM of one slot on sm_90a: what it is for, and its launcher. See sddmm_rows.cuh.
#pragma once

#include "kernels.h"

namespace neuroada::cuda {

// In how many parts of the tokens its sums go, or 0 where another kernel is to take them. The dtype, the sizes and the
// device say so, and not how x and grad lie in memory: the same values have the same bits.
int64_t sddmm_rows_parts(const Sddmm&, const Device&);

// Into partial [parts, d_out, k], or [d_out, k] where there is one part.
void sddmm_rows(const Sddmm&, float* partial, const Device&, void* stream);

}  // namespace neuroada::cuda
