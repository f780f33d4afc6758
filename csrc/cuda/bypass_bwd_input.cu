// The launchers of bypass_bwd_input.cuh.
#include "bypass_bwd_input.cuh"
#include "launch.h"

namespace neuroada::cuda {
namespace {

template <class T>
void run(const BypassBwdInput& p, const Device& device, void* stream) {
  const Tiles tiles =
      choose_tiles("bypass_bwd_input", static_cast<const T*>(p.grad), p.grad_stride, p.tokens, p.d_out, device);
  const int64_t blocks = ceil_div(p.tokens, tiles.groups * kTokens<T>);
  // Every warp has at least one of the plan's parts.
  const int64_t ctas =
      std::clamp<int64_t>(fill_device(blocks, p.d_in, tiles, device), 1, kSplits * kWarp / device.threads);
  const auto kernel = tiles.groups == 2 ? bypass_bwd_input_kernel<T, 2> : bypass_bwd_input_kernel<T, 1>;
  launch("bypass_bwd_input", kernel, blocks, ctas, device.threads, tiles.bytes(), stream,
         BypassBwdInputLaunch{p, tiles});
}

}  // namespace

void bypass_bwd_input(const BypassBwdInput& p, const Device& device, void* stream) {
  if (p.tokens == 0 || p.d_in == 0) return;
  order_entries({p.d_in, p.d_out, p.k, p.plan, p.live, p.delta, p.ordered}, device, stream);
  with_element("bypass_bwd_input", p.dtype, [&](auto element) { run<decltype(element)>(p, device, stream); });
}

}  // namespace neuroada::cuda
