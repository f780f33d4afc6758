// The launcher of bypass_fwd.cuh.
#include "bypass_fwd.cuh"
#include "launch.h"

namespace neuroada::cuda {
namespace {

template <class T>
void run(const BypassFwd& p, const Device& device, void* stream) {
  const Tiles tiles = choose_tiles("bypass_fwd", static_cast<const T*>(p.x), p.x_stride, p.tokens, p.d_in, device);
  const int64_t blocks = ceil_div(p.tokens, tiles.groups * kTokens<T>);
  const int64_t neurons = ceil_div(ceil_div(p.d_out, fill_device(blocks, p.d_out, tiles, device)), kWarp) * kWarp;
  const BypassFwdLaunch args{p, tiles, neurons, slots_aligned(p.k, p.index, p.delta)};
  const auto kernel = tiles.groups == 2 ? bypass_fwd_kernel<T, 2> : bypass_fwd_kernel<T, 1>;
  launch("bypass_fwd", kernel, blocks, ceil_div(p.d_out, neurons), device.threads, tiles.bytes(), stream, args);
}

}  // namespace

void bypass_fwd(const BypassFwd& p, const Device& device, void* stream) {
  if (p.tokens == 0 || p.d_out == 0) return;
  with_element("bypass_fwd", p.dtype, [&](auto element) { run<decltype(element)>(p, device, stream); });
}

}  // namespace neuroada::cuda
