// How the fused kernels for sm_90a are launched: chunks of tokens, each transposed into the workspace and
// multiplied, so that the gathers of the one find in the second cache what the other wrote.
#pragma once

#include "launch.h"
#include "linear_sm90.cuh"
#include "tensor_map_sm90.h"

namespace neuroada::cuda {

// The tile that is compiled for the GPU: the largest whose accumulators two warpgroups hold.
using HopperTile = ProductTile<2, 256, 4>;
static_assert(sizeof(ProductShared<BFloat16, HopperTile>) <= 227 << 10, "the shared memory that a CTA may have");

// One operand as it lies in memory.
struct Operand {
  const char* name;
  const void* data;
  int64_t rows, columns, stride;
};

inline void check_copyable(const char* kernel, const Operand& operand) {
  const auto refuse = [&](const std::string& why) {
    throw std::runtime_error(std::string(kernel) + ": " + operand.name + ": " + why);
  };
  if (!aligned16(operand.data)) refuse("not 16-byte aligned");
  if (operand.rows == 0) refuse("no rows, expected at least one");
  if (operand.columns == 0 || operand.columns % 8 != 0) {
    refuse(std::to_string(operand.columns) + " columns, expected a multiple of 8");
  }
  if (operand.stride < operand.columns) {
    refuse("stride " + std::to_string(operand.stride) + ", expected no less than the columns");
  }
  if (operand.stride % 8 != 0) refuse("stride " + std::to_string(operand.stride) + ", expected a multiple of 8");
  if (std::max(operand.rows, operand.columns) > INT32_MAX - 256) refuse("a size of more than 2^31");
}

// Tokens of a chunk, each of which takes `bytes` of scratch: as many as there is room for, or down to half of
// that, so that the last round of tiles leaves the fewest multiprocessors idle.
template <class Tile>
int64_t choose_chunk(int64_t tokens, int64_t bytes, int64_t columns, const Device& device) {
  const int64_t needed = ceil_div(tokens, Tile::kRows);
  const int64_t most =
      std::clamp<int64_t>(device.scratch_bytes / (std::max<int64_t>(bytes, 1) * Tile::kRows), 1, needed);
  const auto busy = [&](int64_t row_tiles) {
    const int64_t tiles = row_tiles * ceil_div(columns, Tile::kColumns);
    return static_cast<double>(tiles) / static_cast<double>(ceil_div(tiles, device.multiprocessors));
  };
  int64_t best = most;
  for (int64_t row_tiles = most; most < needed && row_tiles >= ceil_div(most, 2); --row_tiles) {
    if (busy(row_tiles) > busy(best)) best = row_tiles;
  }
  return ceil_div(std::min(best * Tile::kRows, tokens), 8) * 8;
}

// out [left.rows, columns] = left right + epilogue, with right [columns, left.columns], or transposed: calls
// launch_chunk(first token, arguments) for each chunk, once that is transposed; that is left out where
// transposed is null.
template <class T, class Tile, bool kRowsOfRight, class Connections, class Launch>
void each_chunk(const char* kernel, DType dtype, const Operand& left, const Operand& right, int64_t chunk,
                void* transposed, const void* bias, void* out, int64_t out_stride, const Connections& connections,
                const Device& device, void* stream, Launch&& launch_chunk) {
  const int64_t columns = kRowsOfRight ? right.columns : right.rows;
  LinearLaunch<Connections> args{};
  args.left =
      make_tensor_map(kernel, dtype, left.data, left.rows, left.columns, left.stride, Tile::kRows, Tile::kDepth);
  args.right = make_tensor_map(kernel, dtype, right.data, right.rows, right.columns, right.stride,
                               kRowsOfRight ? Tile::kDepth : Tile::kColumns, Tile::kDepth);
  args.connections = connections;
  args.epilogue = {transposed, chunk, bias, out, out_stride, aligned16(out) && out_stride % 8 == 0};
  for (int64_t first = 0; first < left.rows; first += chunk) {
    const int64_t tokens = std::min(chunk, left.rows - first);
    const T* from = static_cast<const T*>(left.data) + first * left.stride;
    if (transposed) transpose({dtype, tokens, left.columns, from, left.stride, transposed, chunk}, device, stream);
    Grid& grid = args.grid;
    grid.first_row = static_cast<int32_t>(first);
    grid.rows = static_cast<int32_t>(tokens);
    grid.columns = static_cast<int32_t>(columns);
    grid.depth = static_cast<int32_t>(left.columns);
    grid.row_tiles = static_cast<int32_t>(ceil_div(tokens, Tile::kRows));
    grid.column_tiles = static_cast<int32_t>(ceil_div(columns, Tile::kColumns));
    launch_chunk(first, args);
  }
}

inline int64_t ctas_of(const Grid& grid, const Device& device) {
  return std::min(int64_t{grid.row_tiles} * grid.column_tiles, device.multiprocessors);
}

template <class T, class Tile, bool kRowsOfRight, class Connections>
void run_linear(const char* kernel, DType dtype, const Operand& left, const Operand& right, int64_t chunk,
                void* transposed, const void* bias, void* out, int64_t out_stride, const Connections& connections,
                const Device& device, void* stream) {
  each_chunk<T, Tile, kRowsOfRight>(kernel, dtype, left, right, chunk, transposed, bias, out, out_stride, connections,
                                    device, stream, [&](int64_t, const LinearLaunch<Connections>& args) {
                                      launch(kernel, linear_sm90_kernel<T, Tile, kRowsOfRight, Connections>,
                                             ctas_of(args.grid, device), 1, Tile::kThreads,
                                             static_cast<int64_t>(sizeof(ProductShared<T, Tile>)), stream, args);
                                    });
}

template <class Tile>
void run_linear_fwd(const LinearFwd& p, const Device& device, void* stream) {
  constexpr const char* kName = "linear_fwd";
  const BypassFwd& b = p.bypass;
  const Operand x{"x", b.x, b.tokens, b.d_in, b.x_stride};
  const Operand weight{"weight", p.weight, b.d_out, b.d_in, p.weight_stride};
  check_copyable(kName, x);
  check_copyable(kName, weight);
  const SlotConnections connections{b.index, b.delta, static_cast<int32_t>(b.k), static_cast<int32_t>(b.d_in)};
  with_element16(kName, b.dtype, [&](auto element) {
    run_linear<decltype(element), Tile, false>(kName, b.dtype, x, weight, p.chunk, p.transposed, b.bias, b.out,
                                               b.out_stride, connections, device, stream);
  });
}

inline PlanConnections connections_of(const BypassBwdInput& b) {
  return {b.plan, b.ordered, static_cast<int32_t>(b.live), static_cast<int32_t>(b.d_out)};
}

template <class Tile>
void run_linear_bwd_input(const LinearBwdInput& p, const Device& device, void* stream) {
  constexpr const char* kName = "linear_bwd_input";
  const BypassBwdInput& b = p.bypass;
  const Operand grad{"grad", b.grad, b.tokens, b.d_out, b.grad_stride};
  const Operand weight{"weight", p.weight, b.d_out, b.d_in, p.weight_stride};
  check_copyable(kName, grad);
  check_copyable(kName, weight);
  order_entries({b.d_in, b.d_out, b.k, b.plan, b.live, b.delta, b.ordered}, device, stream);
  with_element16(kName, b.dtype, [&](auto element) {
    run_linear<decltype(element), Tile, true>(kName, b.dtype, grad, weight, p.chunk, p.transposed, nullptr, b.out,
                                              b.out_stride, connections_of(b), device, stream);
  });
}

}  // namespace neuroada::cuda
