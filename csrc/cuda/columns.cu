// The launcher of columns.cuh.
#include "columns.cuh"
#include "launch.h"

namespace neuroada::cuda {
namespace {

constexpr int64_t kMostRows = 64;    // per warp; beyond, column indices are a small part of its reads
constexpr int64_t kWarpsPerSm = 64;  // per SM, if each has kRowsAhead rows

template <class T>
void run(const ChosenColumns& p, const Device& device, void* stream) {
  const bool odd_out = reinterpret_cast<uintptr_t>(p.out) / sizeof(T) % 2 != 0, odd_rows = p.count % 2 != 0;
  const int64_t strips = ceil_div(p.count + (odd_out || odd_rows), kStripColumns);
  const int64_t parts = ceil_div(kWarpsPerSm * device.multiprocessors, strips);
  const int64_t steps = ceil_div(ceil_div(p.tokens, parts), kRowsAhead);
  const int64_t rows = std::min(steps * kRowsAhead, kMostRows);
  const int64_t threads = std::min<int64_t>(device.threads, kColumnsThreads);
  launch("columns", columns_kernel<T>, ceil_div(strips * ceil_div(p.tokens, rows) * kWarp, threads), 1, threads, 0,
         stream, ColumnsLaunch{p, strips, rows, {odd_out, odd_out != odd_rows}});
}

}  // namespace

void columns(const ChosenColumns& p, const Device& device, void* stream) {
  if (p.tokens == 0 || p.count == 0) return;
  if (p.dtype == DType::f64) throw std::runtime_error("columns: dtype float64, expected float32, bfloat16 or float16");
  if (p.dtype == DType::f32) return run<uint32_t>(p, device, stream);
  run<uint16_t>(p, device, stream);
}

}  // namespace neuroada::cuda
