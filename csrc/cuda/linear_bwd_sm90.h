// How the kernel of linear_bwd_sm90.cuh is launched: the connections by the tiles' columns once, then chunk
// after chunk of tokens, whose sums are added onto those of the chunks before.
#pragma once

#include "linear_bwd_sm90.cuh"
#include "linear_sm90.h"

namespace neuroada::cuda {

// The tile that is compiled for the GPU: beside a tile of x there is room for three stages and a strip of 32.
using HopperBwdTile = ProductTile<2, 256, 3, 32>;
static_assert(sizeof(BackwardShared<BFloat16, HopperBwdTile>) <= 227 << 10, "the shared memory that a CTA may have");

// A token takes its transposed grad, and its share of one sum a slot for every tile of tokens.
template <class Tile>
LinearBwdScratch linear_bwd_scratch_of(const BypassBwdInput& p, const Device& device) {
  const int64_t bytes = 2 * p.d_out + ceil_div(p.d_out * p.k * static_cast<int64_t>(sizeof(float)), Tile::kRows);
  const int64_t chunk = choose_chunk<Tile>(p.tokens, bytes, p.d_in, device);
  const int64_t starts = (ceil_div(p.d_in, Tile::kColumns) + 1) * ceil_div(p.d_out, kGroupNeurons);
  return {chunk, starts, ceil_div(chunk, Tile::kRows)};
}

template <class T, class Tile>
void run_linear_bwd(const char* kernel, const LinearBwd& p, const Operand& grad, const Operand& x,
                    const Operand& weight, const Device& device, void* stream) {
  const BypassBwdInput& b = p.input.bypass;
  const int64_t count = b.d_out * b.k;
  each_chunk<T, Tile, true>(
      kernel, b.dtype, grad, weight, p.input.chunk, p.input.transposed, nullptr, b.out, b.out_stride, connections_of(b),
      device, stream, [&](int64_t first, const LinearLaunch<PlanConnections>& linear) {
        const Sums sums{static_cast<const T*>(x.data) + first * x.stride,
                        x.stride,
                        p.start,
                        p.entry,
                        p.partial,
                        static_cast<int32_t>(b.d_out),
                        static_cast<int32_t>(b.k)};
        launch(kernel, linear_bwd_sm90_kernel<T, Tile>, ctas_of(linear.grid, device), 1, Tile::kThreads,
               static_cast<int64_t>(sizeof(BackwardShared<T, Tile>)), stream, LinearBwdLaunch{linear, sums});
        if (count == 0) return;
        launch("add_tiles", add_tiles_kernel, ceil_div(count, device.threads), 1, device.threads, 0, stream,
               AddTilesLaunch{p.partial, p.index, p.grad_delta, linear.grid.row_tiles, count,
                              static_cast<int32_t>(b.d_in), first == 0});
      });
}

// The tokens of a tile must all be of its chunk: x is masked, grad is not, and an infinite grad of the next
// chunk times a masked zero would be a NaN.
template <class Tile>
void run_linear_bwd(const LinearBwd& p, const Device& device, void* stream) {
  constexpr const char* kName = "linear_bwd";
  const BypassBwdInput& b = p.input.bypass;
  const Operand grad{"grad", b.grad, b.tokens, b.d_out, b.grad_stride};
  const Operand x{"x", p.x, b.tokens, b.d_in, p.x_stride};
  const Operand weight{"weight", p.input.weight, b.d_out, b.d_in, p.input.weight_stride};
  for (const Operand* operand : {&grad, &x, &weight}) check_copyable(kName, *operand);
  if (p.input.chunk < b.tokens && p.input.chunk % Tile::kRows != 0) {
    throw std::runtime_error(std::string(kName) + ": chunk: " + std::to_string(p.input.chunk) +
                             " tokens, expected whole tiles of " + std::to_string(Tile::kRows));
  }
  order_entries({b.d_in, b.d_out, b.k, b.plan, b.live, b.delta, b.ordered}, device, stream);
  block_entries({b.d_in, b.d_out, b.k, Tile::kColumns, p.index, p.start, p.entry}, device, stream);
  with_element16(kName, b.dtype, [&](auto element) {
    run_linear_bwd<decltype(element), Tile>(kName, p, grad, x, weight, device, stream);
  });
}

}  // namespace neuroada::cuda
