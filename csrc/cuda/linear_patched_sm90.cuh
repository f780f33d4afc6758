// out = left right + bias for sm_90a, in bfloat16 or float16, summed in float32 and rounded once. The right operand is
// W, whose tiles the spare warps of the producer warpgroup patch in shared memory.
#pragma once

#include "epilogue_sm90.cuh"
#include "patch_sm90.cuh"

namespace neuroada::cuda {

struct LinearPatchedLaunch {
  TensorMap left, right;  // 64-byte aligned in the constant bank, where TMA reads them
  Grid grid;
  Epilogue epilogue;
  Patches patches;
};

// Registers per thread: of the producer warpgroup, which copies and patches, and of each consumer.
constexpr int kPatchRegisters = 88, kMultiplyRegisters = 208;

// For one consumer: computes its 64 rows of every tile of this CTA.
template <class T, class Tile, bool kRowsOfRight>
__device__ __forceinline__ void multiply_tiles(ProductShared<T, Tile>& shared, const LinearPatchedLaunch& a,
                                               int consumer) {
  const int32_t pieces = pieces_of<Tile>(a.grid);
  Stage stage;
  for (int64_t tile = blockIdx.x; tile < tiles_of(a.grid); tile += gridDim.x) {
    float sum[Tile::kAccumulators];
    multiply_tile<T, Tile, kRowsOfRight>(sum, shared, consumer, pieces, stage);
    finish_tile<T, Tile>(sum, a.epilogue, a.grid, place_of<Tile>(a.grid, tile), consumer);
  }
}

template <class T, class Tile, bool kRowsOfRight>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    linear_patched_sm90_kernel(const __grid_constant__ LinearPatchedLaunch a) {
#ifdef NEUROADA_HOPPER
  static_assert(registers_suffice<Tile>(kPatchRegisters, kMultiplyRegisters));
  auto& shared = shared_as<ProductShared<T, Tile>>();
  prepare_barriers(shared);
  if (threadIdx.x >= kWarpgroup) {
    claim_registers<kMultiplyRegisters>();
    multiply_tiles<T, Tile, kRowsOfRight>(shared, a, threadIdx.x / kWarpgroup - 1);
    return;
  }
  release_registers<kPatchRegisters>();
  if (threadIdx.x >= kWarp) {
    patch_tiles<T, Tile, kRowsOfRight>(shared, a.patches, a.grid);
  } else if (threadIdx.x == 0) {
    copy_tiles<T, Tile, kRowsOfRight>(shared, a.left, a.right, a.grid);
  }
#endif
}

}  // namespace neuroada::cuda
