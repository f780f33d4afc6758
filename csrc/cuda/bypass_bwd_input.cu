// The launchers of bypass_bwd_input.cuh.
#include "bypass_bwd_input.cuh"
#include "launch.h"

namespace neuroada::cuda {
namespace {

// Each part of the columns stages all of grad, so there is one, but where there are fewer blocks of tokens than
// multiprocessors.
int64_t column_parts(int64_t blocks, const Device& device) {
  const int64_t most = std::clamp<int64_t>(kSplits * kWarp / device.threads, 1, device.multiprocessors);
  return std::clamp<int64_t>(device.multiprocessors / blocks, 1, most);
}

// More than so many connections, far more than the mean, make a column heavy. Where lanes outnumber columns, warps
// had better read them together.
int32_t light_of(int64_t d_in, int64_t live) {
  constexpr int64_t kLight = 32, kFewColumns = 2 * kMaxThreads;
  return static_cast<int32_t>(d_in < kFewColumns ? kLight : std::max(kLight, ceil_div(live, d_in) * 2));
}

template <class T>
void run(const BypassBwdInput& p, const Device& device, void* stream) {
  const Tiles tiles =
      choose_tiles("bypass_bwd_input", static_cast<const T*>(p.grad), p.grad_stride, p.tokens, p.d_out, device);
  const int32_t light = light_of(p.d_in, p.live);
  check_width("bypass_bwd_input", p.d_in);
  if (ColumnEntries::size(p.d_in, p.live, light) >= int64_t{1} << 29) {
    throw std::runtime_error("bypass_bwd_input: scratch for 2^29 connections or more");
  }
  const ColumnEntries entries{p.ordered, ColumnEntries::positions_of(p.d_in), light};
  launch("column_entries", column_entries_kernel, entries.positions / kWindow, 1, device.threads, 0, stream,
         ColumnEntriesLaunch{entries, p.plan, p.delta, p.d_in, p.live, static_cast<uint32_t>(p.d_out * p.k),
                             static_cast<uint32_t>(std::max<int64_t>(p.k, 1)), tiles.single() ? tiles.zero : -1,
                             tiles.single()});
  const int64_t blocks = ceil_div(p.tokens, kTokens<T>);
  const int64_t parts = column_parts(blocks, device);
  const int64_t token_parts = std::clamp<int64_t>(device.multiprocessors / parts, 1, blocks);
  const auto kernel = tiles.single() ? bypass_bwd_input_kernel<T, true> : bypass_bwd_input_kernel<T, false>;
  launch("bypass_bwd_input", kernel, parts, token_parts, device.threads, tiles.bytes(), stream,
         BypassBwdInputLaunch{p, tiles, blocks, entries});
}

}  // namespace

int64_t bypass_bwd_input_entries(int64_t d_in, int64_t live) {
  return d_in == 0 ? 0 : ColumnEntries::size(d_in, live, light_of(d_in, live));
}

void bypass_bwd_input(const BypassBwdInput& p, const Device& device, void* stream) {
  if (p.tokens == 0 || p.d_in == 0) return;
  with_element("bypass_bwd_input", p.dtype, [&](auto element) { run<decltype(element)>(p, device, stream); });
}

}  // namespace neuroada::cuda
