// How the launchers choose tiles and grids, and how a kernel is started: every return code of CUDA
// becomes an error that names the kernel.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "staging.cuh"

namespace neuroada::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Whether four neighbouring slots of index, delta or their gradient are read as one.
inline bool slots_aligned(int64_t k, const void* a, const void* b) {
  return k % kSlots == 0 && aligned16(a) && aligned16(b);
}

// Two groups of tokens where they fit, to read index and delta half as often; one where only one
// does; tiles of the columns where not even one does.
template <class T>
Tiles choose_tiles(const char* kernel, const T* x, int64_t row_stride, int64_t tokens, int64_t columns,
                   const Device& device) {
  if (columns >= INT32_MAX - 8) throw std::runtime_error(std::string(kernel) + ": more than 2^31 columns");
  const int64_t quads = device.shared_bytes / 16;
  const int64_t padded = ceil_div(columns, 8) * 8;
  Tiles tiles{};
  tiles.columns = static_cast<int32_t>(columns);
  tiles.groups = tokens > kTokens<T> && 2 * (padded + 1) <= quads ? 2 : 1;
  const int64_t width = padded + 1 <= quads ? padded : (quads - 1) / 8 * 8;
  if (width < std::min<int64_t>(padded, 8)) {
    throw std::runtime_error(std::string(kernel) + ": " + std::to_string(device.shared_bytes) +
                             " bytes of shared memory a CTA, expected at least 144");
  }
  tiles.width = static_cast<int32_t>(std::min(width, columns));
  tiles.zero = static_cast<int32_t>(width);
  tiles.stride = tiles.zero + 1;
  tiles.vectors = aligned16(x) && (tokens <= 1 || row_stride * static_cast<int64_t>(sizeof(T)) % 16 == 0);
  return tiles;
}

// How many CTAs of this kernel the device runs at once, by shared memory; more than two a
// multiprocessor gain nothing.
inline int64_t resident_ctas(const Tiles& tiles, const Device& device) {
  return device.multiprocessors * std::clamp<int64_t>(device.shared_bytes / std::max<int64_t>(tiles.bytes(), 1), 1, 2);
}

// Into how many parts `rows` are cut so that, beside `have` CTAs, the device is full.
inline int64_t fill_device(int64_t have, int64_t rows, const Tiles& tiles, const Device& device) {
  const int64_t smallest = std::max<int64_t>(device.threads / 4, 1);
  return std::clamp<int64_t>(ceil_div(resident_ctas(tiles, device), have), 1, ceil_div(rows, smallest));
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
