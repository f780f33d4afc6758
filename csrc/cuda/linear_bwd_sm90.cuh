// dx and the SDDMM in one pass over grad: linear_sm90.cuh, where the copying warpgroup's other warps are those
// of sddmm_sm90.cuh.
#pragma once

#include "linear_sm90.cuh"
#include "sddmm_sm90.cuh"

namespace neuroada::cuda {

struct LinearBwdLaunch {
  LinearLaunch<PlanConnections> linear;
  Sums sums;
};

// Registers a thread: what the warpgroup that copies and sums keeps, and each of the multiplying ones may have.
constexpr int kSumRegisters = 104, kMultiplyBesideSumRegisters = 200;

template <class T, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) linear_bwd_sm90_kernel(const __grid_constant__ LinearBwdLaunch a) {
#ifdef NEUROADA_HOPPER
  static_assert(registers_suffice<Tile>(kSumRegisters, kMultiplyBesideSumRegisters));
  auto& shared = shared_as<BackwardShared<T, Tile>>();
  prepare_barriers<Tile>(shared.full, shared.empty, Tile::kConsumers * kWarpgroup / kWarp + kSpareWarps);
  if (threadIdx.x >= kWarpgroup) {
    claim_registers<kMultiplyBesideSumRegisters>();
    multiply_tiles<T, Tile, true>(shared, a.linear, nullptr, threadIdx.x / kWarpgroup - 1);
    return;
  }
  release_registers<kSumRegisters>();
  if (threadIdx.x >= kWarp) {
    sum_tiles<T, Tile>(shared, a.sums, a.linear.grid, 1 + Tile::kConsumers);
  } else if (threadIdx.x == 0) {
    copy_tiles<T, Tile, true>(shared, a.linear.left, a.linear.right, a.linear.grid);
  }
#endif
}

}  // namespace neuroada::cuda
