// The launchers of sddmm.cuh.
#include "launch.h"
#include "sddmm.cuh"

namespace neuroada::cuda {
namespace {

// The tiles of an x with all columns: how tokens fall into blocks and parts, and so every bit, is theirs.
template <class T>
Tiles whole_tiles_of(const Sddmm& p, const Device& device) {
  const int64_t columns = std::max(p.d_in, p.whole_d_in);
  return choose_tiles("sddmm", static_cast<const T*>(p.x), p.x_stride, p.tokens, columns, device);
}

template <class T>
Tiles tiles_of(const Sddmm& p, const Device& device) {
  Tiles tiles = choose_tiles("sddmm", static_cast<const T*>(p.x), p.x_stride, p.tokens, p.d_in, device);
  tiles.groups = whole_tiles_of<T>(p, device).groups;  // no more than fit: fewer columns are narrower
  return tiles;
}

template <class T>
int64_t blocks_of(const Sddmm& p, const Tiles& tiles) {
  return ceil_div(p.tokens, tiles.groups * kTokens<T>);
}

// As many parts as CTAs run at once, and no more than there are blocks, or scratch for them.
template <class T>
int64_t parts_of(const Sddmm& p, const Device& device) {
  const Tiles tiles = whole_tiles_of<T>(p, device);
  const int64_t bytes = p.d_out * p.k * static_cast<int64_t>(sizeof(float));
  const int64_t affordable = std::max<int64_t>(device.scratch_bytes / bytes, 1);
  return std::min({resident_ctas(tiles, device), blocks_of<T>(p, tiles), affordable});
}

template <class T>
void run(const Sddmm& p, int64_t parts, float* partial, const Device& device, void* stream) {
  const Tiles tiles = tiles_of<T>(p, device);
  const int64_t neurons = ceil_div(ceil_div(p.d_out, fill_device(parts, p.d_out, tiles, device)), kWarp) * kWarp;
  const SddmmLaunch args{p, tiles, blocks_of<T>(p, tiles), neurons, partial, slots_aligned(p.k, p.index, partial)};
  const auto kernel = tiles.groups == 2 ? sddmm_kernel<T, 2> : sddmm_kernel<T, 1>;
  launch("sddmm", kernel, ceil_div(p.d_out, neurons), parts, device.threads, tiles.bytes(), stream, args);
}

}  // namespace

int64_t sddmm_parts(const Sddmm& p, const Device& device) {
  int64_t parts = 0;
  if (p.tokens == 0 || p.d_in == 0 || p.d_out * p.k == 0) return parts;
  with_element("sddmm", p.dtype, [&](auto element) { parts = parts_of<decltype(element)>(p, device); });
  return parts;
}

void sddmm(const Sddmm& p, const Device& device, void* stream) {
  const int64_t count = p.d_out * p.k;
  if (count == 0) return;
  const int64_t parts = sddmm_parts(p, device);
  float* partial = parts == 1 ? p.out : p.partial;
  if (parts > 0) {
    with_element("sddmm", p.dtype, [&](auto element) { run<decltype(element)>(p, parts, partial, device, stream); });
  }
  if (parts == 1) return;
  launch("sddmm", sum_parts_kernel, ceil_div(count, device.threads), 1, device.threads, 0, stream,
         SumPartsLaunch{partial, p.out, parts, count});
}

}  // namespace neuroada::cuda
