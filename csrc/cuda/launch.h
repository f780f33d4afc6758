// How the launchers choose tiles and grids, and how a kernel is started: every return code of CUDA
// becomes an error that names the kernel.
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

// Rows are addressed from their beginning by bytes in 32 bits.
inline void check_width(const char* kernel, int64_t width) {
  if (width >= int64_t{1} << 30) throw std::runtime_error(std::string(kernel) + ": a row of 2^30 values or more");
}

// All columns where a block of them fits, and two such tiles where these do and there is a second block; tiles of
// the columns where not even one does.
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

template <int N>
constexpr std::integral_constant<int, N> kNumber{};

// Rows and blocks of tokens, shared out to CTAs that all run at once: one a multiprocessor, whose registers it
// fills. As few parts of the rows as there may be, since each stages all blocks of its tokens.
struct Shares {
  int64_t rows_a_part, row_parts, token_parts;
};

// `most` is how many rows a CTA may have, `times` how many CTAs share the same rows and tokens.
inline Shares share_out(int64_t rows, int64_t most, int64_t blocks, int64_t times, const Device& device) {
  constexpr int64_t kMultiple = 16, kLeast = 128;  // of rows: whole octets of both neurons of a pair
  const int64_t idle = device.multiprocessors / std::max<int64_t>(blocks * times, 1);
  const int64_t parts = std::max(ceil_div(rows, most), std::min(idle, ceil_div(rows, kLeast)));
  Shares shares{};
  shares.rows_a_part = std::min(ceil_div(ceil_div(rows, parts), kMultiple) * kMultiple, most);
  shares.row_parts = ceil_div(rows, shares.rows_a_part);
  shares.token_parts = std::clamp<int64_t>(device.multiprocessors / (shares.row_parts * times), 1, blocks);
  return shares;
}

// How many connections of how many pairs of neurons a lane holds, and whether a tile has all columns, as
// template arguments: f(pairs, held, whole). As many pairs as there are registers and neurons for: the more, the
// fewer CTAs stage the same tokens. kMost is how many of one pair there are registers for; more than 8 of a neuron
// go in parts if `parts`. Where a tile has not all columns, places change with it and are not held.
template <int kMost, class F>
void with_held(int64_t neurons, int64_t k, bool parts, bool whole, const Device& device, F&& f) {
  const auto fit = [&](int64_t pairs, int64_t held) {
    return (k <= held || (parts && held == kFewHeld)) && neurons > pairs * device.threads;
  };
  if (!whole) return f(kNumber<1>, kNumber<4>, std::false_type{});
  if (fit(8, 2)) return f(kNumber<8>, kNumber<2>, std::true_type{});
  if (fit(4, 4)) return f(kNumber<4>, kNumber<4>, std::true_type{});
  if (fit(2, kFewHeld)) return f(kNumber<2>, kNumber<kFewHeld>, std::true_type{});
  return f(kNumber<1>, kNumber<kMost>, std::true_type{});
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

// The same for the kernels that have 16 bits alone.
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
void launch(const char*, void (*kernel)(Args), int64_t grid_x, int64_t grid_y, int64_t threads, int64_t shared, void*,
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
void launch(const char* name, void (*kernel)(Args), int64_t grid_x, int64_t grid_y, int64_t threads, int64_t shared,
            void* stream, const Args& args) {
  constexpr int64_t kGranted = 48 << 10;  // without asking
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
