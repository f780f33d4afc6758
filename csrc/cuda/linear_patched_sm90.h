// How the kernels of linear_patched_sm90.cuh are launched: the connections by the pieces of W once, then all
// tokens at once, since nothing is transposed.
#pragma once

#include "linear_patched_sm90.cuh"
#include "linear_sm90.h"

namespace neuroada::cuda {

template <class Tile>
int64_t linear_patched_starts_of(int64_t d_in, int64_t d_out, bool forward) {
  const int64_t width = forward ? PatchPiece<Tile, false>::kInputs : PatchPiece<Tile, true>::kInputs;
  return (ceil_div(d_in, width) + 1) * ceil_div(d_out, kGroupNeurons);
}

template <class Tile, bool kRowsOfRight>
void run_linear_patched(const char* kernel, const Operand& from, const LinearPatched& p, const Device& device,
                        void* stream) {
  constexpr int64_t kWidth = PatchPiece<Tile, kRowsOfRight>::kInputs;
  const Operand weight{"weight", p.weight, p.d_out, p.d_in, p.weight_stride};
  check_copyable(kernel, from);
  check_copyable(kernel, weight);
  block_entries({p.d_in, p.d_out, p.k, kWidth, p.index, p.start, p.entry}, device, stream);
  const Patches patches{p.start,
                        p.entry,
                        p.delta,
                        static_cast<int32_t>(p.d_out),
                        static_cast<int32_t>(p.k),
                        static_cast<int32_t>(ceil_div(p.d_in, kWidth))};
  with_element16(kernel, p.dtype, [&](auto element) {
    using T = decltype(element);
    each_chunk<T, Tile, kRowsOfRight>(
        kernel, p.dtype, from, weight, p.tokens, nullptr, p.bias, p.out, p.out_stride, NoConnections{}, device, stream,
        [&](int64_t, const LinearLaunch<NoConnections>& linear) {
          launch(kernel, linear_patched_sm90_kernel<T, Tile, kRowsOfRight>, ctas_of(linear.grid, device), 1,
                 Tile::kThreads, static_cast<int64_t>(sizeof(ProductShared<T, Tile>)), stream,
                 LinearPatchedLaunch{linear, patches});
        });
  });
}

template <class Tile>
void run_linear_patched_fwd(const LinearPatched& p, const Device& device, void* stream) {
  run_linear_patched<Tile, false>("linear_patched_fwd", {"x", p.from, p.tokens, p.d_in, p.from_stride}, p, device,
                                  stream);
}

template <class Tile>
void run_linear_patched_bwd_input(const LinearPatched& p, const Device& device, void* stream) {
  run_linear_patched<Tile, true>("linear_patched_bwd_input", {"grad", p.from, p.tokens, p.d_out, p.from_stride}, p,
                                 device, stream);
}

}  // namespace neuroada::cuda
