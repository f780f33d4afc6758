// The launcher of transpose_sm90.cuh.
#include "launch.h"
#include "transpose_sm90.cuh"

namespace neuroada::cuda {

void transpose(const Transpose& p, const Device& device, void* stream) {
  const int64_t columns = device.threads / kWarp * kTransposeColumns;  // of a CTA
  with_element16("transpose", p.dtype, [&](auto element) {
    launch("transpose", transpose_kernel<decltype(element)>, ceil_div(p.tokens, kTransposeTokens),
           ceil_div(p.columns, columns), device.threads, 0, stream, p);
  });
}

}  // namespace neuroada::cuda
