// Launches the forward bypass: bypass_fwd_rows where it applies, otherwise bypass_fwd.cuh.
#include "bypass_fwd.cuh"
#include "bypass_fwd_rows.h"
#include "launch.h"

namespace neuroada::cuda {
namespace {

template <class T>
void run(const BypassFwd& p, const Device& device, void* stream) {
  Tiles tiles = choose_tiles("bypass_fwd", static_cast<const T*>(p.x), p.x_stride, p.tokens, p.d_in, device);
  check_width("bypass_fwd", p.d_out);
  const bool held_fit = p.k <= kMostHeld;
  with_held<kMostHeld>(p.d_out, p.k, false, tiles.single() && held_fit, device, [&](auto pairs, auto held, auto whole) {
    const int64_t blocks = ceil_div(p.tokens, kTokens<T>);
    const Shares shares = share_out(p.d_out, 2 * pairs * device.threads, blocks, 1, device);
    const bool base_vectors = p.wide_base ? pairs_aligned(static_cast<const float*>(p.base), p.base_stride, p.tokens)
                                          : pairs_aligned(static_cast<const T*>(p.base), p.base_stride, p.tokens);
    const bool vectors = base_vectors && pairs_aligned(static_cast<const T*>(p.out), p.out_stride, p.tokens);
    KernelOf<BypassFwdLaunch> kernel = bypass_fwd_kernel<T, pairs, held, whole, Staging::loaded>;
    if constexpr (sizeof(T) == 2 && whole) {
      const T* x = static_cast<const T*>(p.x);
      tiles = with_two_tiles(with_bulk_copies(tiles, x, p.x_stride, p.tokens, device), device);
      if (tiles.stages > 0) kernel = bypass_fwd_bulk_kernel(p, device, tiles);
    }
    const BypassFwdLaunch args{p, tiles, blocks, shares.rows_per_part, slots_aligned(p.k, p.index, p.delta), vectors};
    launch("bypass_fwd", kernel, shares.row_parts, shares.token_parts, device.threads, tiles.bytes(), stream, args);
  });
}

}  // namespace

void bypass_fwd(const BypassFwd& p, const Device& device, void* stream) {
  if (p.tokens == 0 || p.d_out == 0 || bypass_fwd_rows(p, device, stream)) return;
  with_element("bypass_fwd", p.dtype, [&](auto element) { run<decltype(element)>(p, device, stream); });
}

}  // namespace neuroada::cuda
