// How the launchers choose tiles and grids, and start a kernel: every CUDA error is thrown with the kernel's name.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels.h"
#include "pairs.cuh"

namespace neuroada::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned8(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 8 == 0; }
inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Elements of a row have 32-bit byte offsets.
inline void check_width(const char* kernel, int64_t width) {
  if (width >= int64_t{1} << 30) throw std::runtime_error(std::string(kernel) + ": a row of 2^30 values or more");
}

// One tile of all columns if it fits, two if both fit and there is a second block; tiles of some of the columns if not
// even one fits.
template <class T>
Tiles choose_tiles(const char* kernel, const T* x, int64_t row_stride, int64_t tokens, int64_t columns,
                   const Device& device) {
  check_width(kernel, columns);
  const int64_t quads = std::min<int64_t>(device.shared_bytes / 16, UINT16_MAX);
  const int64_t padded = ceil_div(columns, 8) * 8;
  const int64_t width = padded + 1 <= quads ? padded : (quads - 1) / 8 * 8;
  if (width < std::min<int64_t>(padded, 8)) {
    throw std::runtime_error(std::string(kernel) + ": " + std::to_string(device.shared_bytes) +
                             " bytes of shared memory a CTA, expected at least 144");
  }
  Tiles tiles{};
  tiles.columns = static_cast<int32_t>(columns);
  tiles.width = static_cast<int32_t>(std::min(width, columns));
  tiles.zero = static_cast<int32_t>(width);
  tiles.stride = tiles.zero + 1;
  tiles.count = tokens > kTokens<T> && 2 * (padded + 1) <= quads ? 2 : 1;
  tiles.vectors = aligned8(x) && (tokens <= 1 || row_stride * static_cast<int64_t>(sizeof(T)) % 8 == 0);
  return tiles;
}

// Whether `device` can bulk-copy rows of x: in 16 bits, with starts and sizes that are multiples of 16 bytes. There is
// no minimum number of rows, so that all parts of the tokens are treated alike.
template <class T>
bool copies_in_bulk(const T* x, int64_t row_stride, int64_t tokens, int64_t columns, const Device& device) {
  const auto whole_quads = [](int64_t values) { return values * static_cast<int64_t>(sizeof(T)) % 16 == 0; };
  const bool aligned = aligned16(x) && (tokens <= 1 || whole_quads(row_stride)) && whole_quads(columns);
  return device.bulk_copies && sizeof(T) == 2 && columns > 0 && aligned;
}

// Keeps the tile of all columns, and adds stages for the next blocks after it if there is room for at least one.
template <class T>
Tiles with_bulk_copies(Tiles tiles, const T* x, int64_t row_stride, int64_t tokens, const Device& device) {
  if (!tiles.single() || !copies_in_bulk(x, row_stride, tokens, tiles.columns, device)) return tiles;
  const int64_t left = device.shared_bytes / 16 - tiles.stride - 1;
  const auto stages = static_cast<int32_t>(std::clamp<int64_t>(left / tiles.columns, 0, kMostStages));
  if (stages > 0) {
    tiles.count = 1;
    tiles.stages = stages;
  }
  return tiles;
}

// Makes one tile two (StaggeredBlocks) if the device has two_tiles set and both fit beside one stage.
inline Tiles with_two_tiles(Tiles tiles, const Device& device) {
  constexpr int32_t kLeastColumns = 16, kLeastThreads = 2 * kWarp;
  if (!device.two_tiles || tiles.stages == 0 || tiles.columns < kLeastColumns || device.threads < kLeastThreads) {
    return tiles;
  }
  Tiles two = tiles;
  two.count = 2;
  two.stages = 1;
  return two.bytes() <= device.shared_bytes ? two : tiles;
}

// Tiles of some of the columns, as few and as even as possible, with room for one stage. They start at multiples of 64
// (of 8 if fewer fit), so that a column has the same bank as in a tile of all columns, for which slots are ordered.
template <class T>
Tiles cut_for_bulk_copies(Tiles tiles, const T* x, int64_t row_stride, int64_t tokens, const Device& device) {
  const int64_t fit = (device.shared_bytes / 16 - 2) / 2, multiple = fit >= 64 ? 64 : 8,
                most = fit / multiple * multiple;
  if (most == 0 || !copies_in_bulk(x, row_stride, tokens, tiles.columns, device)) return tiles;
  const int64_t count = ceil_div(tiles.columns, most);
  if (count < 2) return tiles;
  tiles.width = static_cast<int32_t>(ceil_div(ceil_div(tiles.columns, count), multiple) * multiple);
  tiles.zero = tiles.width;
  tiles.stride = tiles.zero + 1;
  tiles.count = tiles.stages = 1;
  return tiles;
}

template <int N>
constexpr std::integral_constant<int, N> kNumber{};

// Partition of rows and blocks of tokens over CTAs that all run at once: one per SM, whose registers it fills. As few
// parts of the rows as possible, since each stages all blocks of its tokens.
struct Shares {
  int64_t rows_per_part, row_parts, token_parts;
};

// `most` is the maximum number of rows per CTA, `times` how many CTAs share the same rows and tokens.
inline Shares share_out(int64_t rows, int64_t most, int64_t blocks, int64_t times, const Device& device) {
  constexpr int64_t kMultiple = 16, kLeast = 128;  // of rows: whole octets of both neurons of a pair
  const int64_t idle = device.multiprocessors / std::max<int64_t>(blocks * times, 1);
  const int64_t parts = std::max(ceil_div(rows, most), std::min(idle, ceil_div(rows, kLeast)));
  Shares shares{};
  shares.rows_per_part = std::min(ceil_div(ceil_div(rows, parts), kMultiple) * kMultiple, most);
  shares.row_parts = ceil_div(rows, shares.rows_per_part);
  shares.token_parts = std::clamp<int64_t>(device.multiprocessors / (shares.row_parts * times), 1, blocks);
  return shares;
}

// Calls f(pairs, held): the pairs of neurons per lane and the connections held per neuron, as template arguments. As
// many pairs as registers and neurons allow: the more, the fewer CTAs stage the same tokens. kMost is the number held
// with one pair. With `parts`, more than 8 per neuron are held in parts.
template <int kMost, class F>
void with_held(int64_t neurons, int64_t k, bool parts, const Device& device, F&& f) {
  const auto fit = [&](int64_t pairs, int64_t held) {
    return (k <= held || (parts && held == kFewHeld)) && neurons > pairs * device.threads;
  };
  if (fit(8, 2)) return f(kNumber<8>, kNumber<2>);
  if (fit(4, 4)) return f(kNumber<4>, kNumber<4>);
  if (fit(2, kFewHeld)) return f(kNumber<2>, kNumber<kFewHeld>);
  return f(kNumber<1>, kNumber<kMost>);
}

// The same with f(pairs, held, whole): whether a tile has all columns. If not, places change with the tile and are not
// held.
template <int kMost, class F>
void with_held(int64_t neurons, int64_t k, bool parts, bool whole, const Device& device, F&& f) {
  if (!whole) return f(kNumber<1>, kNumber<4>, std::false_type{});
  with_held<kMost>(neurons, k, parts, device, [&](auto pairs, auto held) { f(pairs, held, std::true_type{}); });
}

// Calls f with a value of the element type, for its type alone.
template <class F>
void with_element(const char* kernel, DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(BFloat16{});
    case DType::f16: return f(Half{});
    default: throw std::runtime_error(std::string(kernel) + ": dtype float64, expected float32, bfloat16 or float16");
  }
}

// The same for kernels of 16-bit types only.
template <class F>
void with_element16(const char* kernel, DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16: return f(BFloat16{});
    case DType::f16: return f(Half{});
    default: throw std::runtime_error(std::string(kernel) + ": expected bfloat16 or float16");
  }
}

#ifdef NEUROADA_HOST_CUDA

template <class Args>
void launch(const char*, KernelOf<Args> kernel, int64_t grid_x, int64_t grid_y, int64_t threads, int64_t shared, void*,
            const Args& args) {
  host_cuda::launch({static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y)}, static_cast<unsigned>(threads),
                    static_cast<size_t>(shared), [&] { kernel(args); });
}

#else

inline void check(const char* kernel, const char* call, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // so that the next launch does not report this one's error
  throw std::runtime_error(std::string(kernel) + ": " + call + ": " + cudaGetErrorName(error) + ", " +
                           cudaGetErrorString(error));
}

template <class Args>
void launch(const char* name, KernelOf<Args> kernel, int64_t grid_x, int64_t grid_y, int64_t threads, int64_t shared,
            void* stream, const Args& args) {
  constexpr int64_t kGranted = 48 << 10;  // without opt-in
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared > kGranted) {
    check(name, "cudaFuncSetAttribute",
          cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  }
  void* arguments[] = {const_cast<Args*>(&args)};
  check(name, "cudaLaunchKernel",
        cudaLaunchKernel(function, dim3(static_cast<unsigned>(grid_x), static_cast<unsigned>(grid_y)),
                         dim3(static_cast<unsigned>(threads)), arguments, static_cast<size_t>(shared),
                         static_cast<cudaStream_t>(stream)));
}

#endif

}  // namespace neuroada::cuda
