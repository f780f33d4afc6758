// Launches the kernels of linear_patched_sm90.cuh: first a kernel that sorts the connections by pieces of W, then the
// GEMM.
#pragma once

#include "linear_patched_sm90.cuh"
#include "operand_sm90.h"
#include "tensor_map_sm90.h"

namespace neuroada::cuda {

// The tile that is compiled for the GPU: the largest whose accumulators fit into the registers of two warpgroups.
using HopperTile = ProductTile<2, 256, 4>;
static_assert(sizeof(ProductShared<BFloat16, HopperTile>) <= 227 << 10, "the shared memory that a CTA may have");

template <class Tile>
Grid grid_of(const Operand& left, int64_t columns) {
  return {static_cast<int32_t>(left.rows), static_cast<int32_t>(columns), static_cast<int32_t>(left.columns),
          static_cast<int32_t>(ceil_div(left.rows, Tile::kRows)),
          static_cast<int32_t>(ceil_div(columns, Tile::kColumns))};
}

template <class Tile>
int64_t linear_patched_starts_of(int64_t d_in, int64_t d_out, bool forward) {
  const int64_t width = forward ? PatchPiece<Tile, false>::kInputs : PatchPiece<Tile, true>::kInputs;
  return (ceil_div(d_in, width) + 1) * ceil_div(d_out, kGroupNeurons);
}

// out [from.rows, columns] = from right + bias, where right is the weight [columns, from.columns] or, with
// kRowsOfRight, [from.columns, columns].
template <class Tile, bool kRowsOfRight>
void run_linear_patched(const char* kernel, const Operand& from, const LinearPatched& p, const Device& device,
                        void* stream) {
  constexpr int64_t kWidth = PatchPiece<Tile, kRowsOfRight>::kInputs;
  const Operand weight{"weight", p.weight, p.d_out, p.d_in, p.weight_stride};
  check_copyable(kernel, from);
  check_copyable(kernel, weight);
  block_entries({p.d_in, p.d_out, p.k, kWidth, p.index, p.start, p.entry}, device, stream);
  const LinearPatchedLaunch args{
      make_tensor_map(kernel, p.dtype, from.data, from.rows, from.columns, from.stride, Tile::kRows, Tile::kDepth),
      make_tensor_map(kernel, p.dtype, weight.data, weight.rows, weight.columns, weight.stride,
                      kRowsOfRight ? Tile::kDepth : Tile::kColumns, Tile::kDepth),
      grid_of<Tile>(from, kRowsOfRight ? p.d_in : p.d_out),
      {p.bias, p.out, p.out_stride, aligned16(p.out) && p.out_stride % 8 == 0},
      {p.start, p.entry, p.delta, static_cast<int32_t>(p.d_out), static_cast<int32_t>(p.k),
       static_cast<int32_t>(ceil_div(p.d_in, kWidth))}};
  const int64_t tiles = int64_t{args.grid.row_tiles} * args.grid.column_tiles;
  with_element16(kernel, p.dtype, [&](auto element) {
    using T = decltype(element);
    launch(kernel, linear_patched_sm90_kernel<T, Tile, kRowsOfRight>, std::min(tiles, device.multiprocessors), 1,
           Tile::kThreads, static_cast<int64_t>(sizeof(ProductShared<T, Tile>)), stream, args);
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
