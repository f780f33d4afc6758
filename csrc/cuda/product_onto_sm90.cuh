// onto = from weight^T + bias + onto, or onto = from weight + onto, by CUTLASS for sm_90a: the old value of onto is
// added to the float32 sums, and the result is rounded once. cuBLAS rounds the product first for the same operation,
// and so loses what lies below the product's ULP.
//
// Forward and dx are separate sources, as each takes longer to compile than any other.
#pragma once

#include "product_onto_sm90.h"

#ifdef NEUROADA_CUTLASS

#include <cutlass/cutlass.h>

#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

namespace neuroada::cuda {

template <class T>
struct CutlassElement;
template <>
struct CutlassElement<BFloat16> {
  using type = cutlass::bfloat16_t;
};
template <>
struct CutlassElement<Half> {
  using type = cutlass::half_t;
};

// How two consumer warpgroups process output tiles. Pingpong: each has its own of 128 x 128, and runs its epilogue
// while the other one multiplies.
struct OwnTiles {
  static constexpr int kColumns = 128, kRowPair = 1, kColumnPair = 2;  // of a cluster, which shares a tile of x
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecialized;
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedPingpong;
};

// Cooperative: both share one of 128 x 256. No tile whose sums fit into registers reads fewer bytes per product, but
// both wait in its epilogue.
struct SharedTile {
  static constexpr int kColumns = 256, kRowPair = 2, kColumnPair = 1;  // the cluster shares a tile of W
  using EpilogueSchedule = cutlass::epilogue::TmaWarpSpecializedCooperative;
  using Schedule = cutlass::gemm::KernelTmaWarpSpecializedCooperative;
};

// Length of K from which the epilogue counts for less than the bytes: measured at 4096 and 14336.
constexpr int64_t kLongSum = 8192;

template <class T, bool kRowsOfRight, class Form>
struct OntoProduct {
  using Element = typename CutlassElement<T>::type;
  using Tile = cute::Shape<cute::_128, cute::Int<Form::kColumns>, cute::_64>;
  using Cluster = cute::Shape<cute::Int<Form::kRowPair>, cute::Int<Form::kColumnPair>, cute::_1>;
  using RowMajor = cutlass::layout::RowMajor;
  using Right = std::conditional_t<kRowsOfRight, RowMajor, cutlass::layout::ColumnMajor>;
  static constexpr int kAligned = 8;  // elements, 16 bytes

  // beta * onto + (alpha * sum + bias) in float32, rounded once; a null bias is zero. Bias elements are read one by
  // one, so that bias needs no alignment.
  using Sum = cutlass::epilogue::fusion::LinCombPerColBias<Element, float, Element, Element, float, 1>;

  // onto is both C and D. A CTA stores an epilogue subtile only after reading all of it, no other CTA accesses it, and
  // prefetched subtiles are different ones. C and D also share shared memory (ReuseSmemC): a subtile is summed in
  // place, and overwritten only after its store has read it.
  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, Element, RowMajor, kAligned, Element, RowMajor,
      kAligned, typename Form::EpilogueSchedule, Sum>::CollectiveOp;
  using Stages =
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, RowMajor, kAligned, Element, Right, kAligned, float,
      Tile, Cluster, Stages, typename Form::Schedule>::CollectiveOp;

  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue,
                                                      cutlass::gemm::PersistentScheduler>;
  using Params = typename Kernel::Params;
  static_assert(Kernel::SharedStorageSize <= 227 << 10, "the shared memory that a CTA may have");
  static_assert(alignof(typename Kernel::SharedStorage) <= 1024, "what the kernel asks for");
};

// Replaces CUTLASS's own entry point, which has all of its types in its name.
template <class T, bool kRowsOfRight, class Form>
__global__ void __launch_bounds__(OntoProduct<T, kRowsOfRight, Form>::Kernel::MaxThreadsPerBlock, 1)
    product_onto_sm90_kernel(const __grid_constant__ typename OntoProduct<T, kRowsOfRight, Form>::Params params) {
  extern __shared__ __align__(1024) char neuroada_onto_shared[];
  typename OntoProduct<T, kRowsOfRight, Form>::Kernel()(params, neuroada_onto_shared);
}

namespace {

// Tiles go in strips of up to 8, so that concurrent CTAs share both operands in L2. If strips do not divide the tiles,
// the scheduler pads with tiles of zeros, which take as long as any.
template <class Form>
int strip_of(const Operand& onto) {
  const int64_t rows = ceil_div(onto.rows, Form::kRowPair * 128),
                columns = ceil_div(onto.columns, Form::kColumnPair * Form::kColumns);
  int strip = 8;
  while (rows % strip != 0 || columns % strip != 0) strip /= 2;
  return strip;
}

template <class T, bool kRowsOfRight, class Form>
auto arguments_of(const OntoOperands& operands, const void* bias, const Device& device) {
  using Product = OntoProduct<T, kRowsOfRight, Form>;
  using Element = typename Product::Element;
  typename Product::Kernel::StrideA left{};
  typename Product::Kernel::StrideB right{};
  typename Product::Kernel::StrideC onto{};
  cute::get<0>(left) = operands.left.stride;
  cute::get<kRowsOfRight ? 1 : 0>(right) = operands.weight.stride;
  cute::get<0>(onto) = operands.onto.stride;
  const auto* onto_in = static_cast<const Element*>(operands.onto.data);

  typename Product::Kernel::Arguments args{};
  args.mode = cutlass::gemm::GemmUniversalMode::kGemm;
  args.problem_shape = {static_cast<int>(operands.onto.rows), static_cast<int>(operands.onto.columns),
                        static_cast<int>(operands.left.columns), 1};
  args.mainloop = {static_cast<const Element*>(operands.left.data), left,
                   static_cast<const Element*>(operands.weight.data), right};
  args.epilogue = {{}, onto_in, onto, const_cast<Element*>(onto_in), onto};
  args.epilogue.thread.alpha = 1;
  args.epilogue.thread.beta = 1;
  args.epilogue.thread.bias_ptr = static_cast<const Element*>(bias);
  // Set, so that CUTLASS does not query the device.
  args.hw_info.sm_count = static_cast<int>(device.multiprocessors);
  args.scheduler.max_swizzle_size = strip_of<Form>(operands.onto);
  if (std::is_same_v<Form, OwnTiles>) {
    args.scheduler.raster_order = Product::Kernel::TileScheduler::RasterOrderOptions::AlongM;
  }
  return args;
}

// Launches clusters of two CTAs, which launch.h does not support.
template <class Form, class Params>
void launch_pairs(const char* name, void (*kernel)(Params), dim3 grid, dim3 threads, int shared, void* stream,
                  Params& params) {
  const void* function = reinterpret_cast<const void*>(kernel);
  check(name, "cudaFuncSetAttribute",
        cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = Form::kRowPair;
  cluster.val.clusterDim.y = Form::kColumnPair;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = threads;
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  void* arguments[] = {&params};
  check(name, "cudaLaunchKernelExC", cudaLaunchKernelExC(&config, function, arguments));
}

template <class T, bool kRowsOfRight, class Form>
void run(const char* name, const OntoOperands& operands, const void* bias, const Device& device, void* stream) {
  using Kernel = typename OntoProduct<T, kRowsOfRight, Form>::Kernel;
  const auto args = arguments_of<T, kRowsOfRight, Form>(operands, bias, device);
  if (!Kernel::can_implement(args) || Kernel::get_workspace_size(args) != 0) {
    throw std::runtime_error(std::string(name) + ": CUTLASS cannot run this product");
  }
  // CUTLASS only prints an error if the driver cannot encode an operand's layout: such operands are refused before.
  auto params = Kernel::to_underlying_arguments(args, nullptr);
  launch_pairs<Form>(name, product_onto_sm90_kernel<T, kRowsOfRight, Form>, Kernel::get_grid_shape(params),
                     Kernel::get_block_shape(), Kernel::SharedStorageSize, stream, params);
}

}  // namespace

template <bool kForward>
void product_onto(const char* name, const ProductOnto& p, const Device& device, void* stream) {
  const OntoOperands operands = checked_onto_operands(name, p, kForward);
  with_element16(name, p.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run_as = operands.left.columns < kLongSum ? run<T, !kForward, OwnTiles> : run<T, !kForward, SharedTile>;
    run_as(name, operands, kForward ? p.bias : nullptr, device, stream);
  });
}

}  // namespace neuroada::cuda

#else

namespace neuroada::cuda {

template <bool kForward>
void product_onto(const char* name, const ProductOnto& p, const Device&, void*) {
  checked_onto_operands(name, p, kForward);
  throw std::runtime_error(std::string(name) + ": built without CUTLASS, expected NEUROADA_CUTLASS or PyPI's " +
                           "nvidia-cutlass when building");
}

}  // namespace neuroada::cuda

#endif
