// Product and bypass in one kernel for sm_90a: out = left right + bias + bypass, in bfloat16 or float16,
// summed in float32 and rounded once.
#pragma once

#include "epilogue_sm90.cuh"
#include "plan.cuh"

namespace neuroada::cuda {

template <class Connections>
struct LinearLaunch {
  TensorMap left, right;  // 64-byte aligned in the constant bank, where the copies read them
  Grid grid;
  Epilogue epilogue;
  Connections connections;
};

// Registers a thread: what the copying warpgroup keeps, and each of the multiplying ones may have.
constexpr int kCopyRegisters = 40, kMultiplyRegisters = 232;

// One consumer: its 64 rows of every tile that this CTA has.
template <class T, class Tile, bool kRowsOfRight, class Connections>
__device__ __forceinline__ void multiply_tiles(ProductShared<T, Tile>& shared, const LinearLaunch<Connections>& a,
                                               Barrier* patched, int consumer) {
  const int32_t pieces = pieces_of<Tile>(a.grid);
  Stage stage;
  for (int64_t tile = blockIdx.x; tile < tiles_of(a.grid); tile += gridDim.x) {
    float sum[Tile::kAccumulators];
    multiply_tile<T, Tile, kRowsOfRight>(sum, shared, patched, consumer, pieces, stage);
    finish_tile<T, Tile>(sum, shared.staged[consumer], a.connections, a.epilogue, a.grid, place_of<Tile>(a.grid, tile),
                         consumer);
  }
}

template <class T, class Tile, bool kRowsOfRight, class Connections>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    linear_sm90_kernel(const __grid_constant__ LinearLaunch<Connections> a) {
#ifdef NEUROADA_HOPPER
  static_assert(registers_suffice<Tile>(kCopyRegisters, kMultiplyRegisters));
  auto& shared = shared_as<ProductShared<T, Tile>>();
  prepare_barriers<Tile>(shared.full, shared.empty, Tile::kConsumers * kWarpgroup / kWarp);
  if (threadIdx.x < kWarpgroup) {
    release_registers<kCopyRegisters>();
    if (threadIdx.x == 0) copy_tiles<T, Tile, kRowsOfRight>(shared, a.left, a.right, a.grid);
    return;
  }
  claim_registers<kMultiplyRegisters>();
  multiply_tiles<T, Tile, kRowsOfRight>(shared, a, nullptr, threadIdx.x / kWarpgroup - 1);
#endif
}

// For a weight that holds the bypass already.
struct NoConnections {
  __device__ __forceinline__ Span of(int64_t) const { return {0, 0}; }
  __device__ __forceinline__ Connection at(int32_t) const { return {-1, 0}; }
};

// The connections of neuron j are its slots.
struct SlotConnections {
  const int32_t* index;  // [d_out, k]
  const float* delta;
  int32_t k, d_in;

  __device__ __forceinline__ Span of(int64_t j) const {
    const int32_t begin = static_cast<int32_t>(j) * k;
    return {begin, begin + k};
  }
  __device__ __forceinline__ Connection at(int32_t i) const {
    const int32_t column = index[i];
    return {column < d_in ? column : -1, delta[i]};
  }
};

// The connections of input c are those of the plan, in its order.
struct PlanConnections {
  const int32_t* plan;
  const WeightedNeuron* ordered;  // [live]
  int32_t live, d_out;

  __device__ __forceinline__ Span of(int64_t c) const {
    return {start_of_column(plan, live, c), start_of_column(plan, live, c + 1)};
  }
  __device__ __forceinline__ Connection at(int32_t i) const {
    const WeightedNeuron entry = ordered[i];
    return {entry.neuron < d_out ? entry.neuron : -1, entry.delta};
  }
};

}  // namespace neuroada::cuda
