// linear_sm90.cuh without a bypass of its own: W's tiles are patched in shared memory, by the warps of the copying
// warpgroup that copy nothing.
#pragma once

#include "linear_sm90.cuh"
#include "patch_sm90.cuh"

namespace neuroada::cuda {

struct LinearPatchedLaunch {
  LinearLaunch<NoConnections> linear;
  Patches patches;
};

// Registers a thread: what the warpgroup that copies and patches keeps, and each of the multiplying ones may have.
constexpr int kPatchRegisters = 88, kMultiplyBesidePatchRegisters = 208;

template <class T, class Tile, bool kRowsOfRight>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    linear_patched_sm90_kernel(const __grid_constant__ LinearPatchedLaunch a) {
#ifdef NEUROADA_HOPPER
  static_assert(registers_suffice<Tile>(kPatchRegisters, kMultiplyBesidePatchRegisters));
  auto& shared = shared_as<ProductShared<T, Tile>>();
  for (int i = 0; threadIdx.x == 0 && i < Tile::kStages; ++i) init_barrier(shared.patched[i], kSpareWarps);
  prepare_barriers<Tile>(shared.full, shared.empty, Tile::kConsumers * kWarpgroup / kWarp);
  if (threadIdx.x >= kWarpgroup) {
    claim_registers<kMultiplyBesidePatchRegisters>();
    multiply_tiles<T, Tile, kRowsOfRight>(shared, a.linear, shared.patched, threadIdx.x / kWarpgroup - 1);
    return;
  }
  release_registers<kPatchRegisters>();
  if (threadIdx.x >= kWarp) {
    patch_tiles<T, Tile, kRowsOfRight>(shared, a.patches, a.linear.grid);
  } else if (threadIdx.x == 0) {
    copy_tiles<T, Tile, kRowsOfRight>(shared, a.linear.left, a.linear.right, a.linear.grid);
  }
#endif
}

}  // namespace neuroada::cuda
