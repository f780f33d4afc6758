// The launchers of sddmm.cuh.
#include "launch.h"
#include "sddmm.cuh"
#include "sddmm_rows.h"
#include "sum_parts.cuh"

namespace neuroada::cuda {
namespace {

// Partition of the neurons, their slots and the tokens.
struct SddmmShares {
  Shares shares;
  int64_t blocks, slot_parts;
};

template <class T>
SddmmShares share_out(const Sddmm& p, int64_t pairs, int64_t held, const Device& device) {
  const int64_t blocks = ceil_div(p.tokens, kTokens<T>), slot_parts = ceil_div(p.k, held);
  Shares shares = cuda::share_out(p.d_out, 2 * pairs * device.threads, blocks, slot_parts, device);
  const int64_t bytes = p.d_out * p.k * static_cast<int64_t>(sizeof(float));
  shares.token_parts = std::min(shares.token_parts, std::max<int64_t>(device.scratch_bytes / bytes, 1));
  return {shares, blocks, slot_parts};
}

// The number of token parts, and so every bit, depends only on the device and the sizes: the same x gives the same
// bits, whether it can be bulk-copied or not.
template <class T>
SddmmShares shares_of(const Sddmm& p, int64_t pairs, int64_t held, bool whole, bool copied, const Device& device) {
  SddmmShares own = share_out<T>(p, pairs, held, device);
  if (!device.bulk_copies || sizeof(T) != 2 || !whole || !holds_all_slots(p.k)) return own;
  const SddmmShares all_slots = share_out<T>(p, 1, kMostHeld, device);
  if (copied) return all_slots;
  own.shares.token_parts = all_slots.shares.token_parts;
  return own;
}

template <class T>
Tiles tiles_of(const Sddmm& p, int64_t d_in, const Device& device) {
  return choose_tiles("sddmm", static_cast<const T*>(p.x), p.x_stride, p.tokens, d_in, device);
}

// f(pairs, held, whole) for an x with all columns, which determines the partition, and so every bit.
template <class T, class F>
void with_held_of(const Sddmm& p, const Device& device, F&& f) {
  with_held<kFewHeld>(p.d_out, p.k, true, tiles_of<T>(p, std::max(p.d_in, p.whole_d_in), device).single(), device, f);
}

template <class T>
void run(const Sddmm& p, float* partial, const Device& device, void* stream) {
  check_width("sddmm", p.d_out);
  with_held_of<T>(p, device, [&](auto pairs, auto held, auto whole) {
    Tiles tiles = tiles_of<T>(p, p.d_in, device);
    KernelOf<SddmmLaunch> kernel = sddmm_kernel<T, pairs, held, whole, Staging::loaded>;
    if constexpr (sizeof(T) == 2 && whole) {
      const T* x = static_cast<const T*>(p.x);
      tiles = with_two_tiles(with_bulk_copies(tiles, x, p.x_stride, p.tokens, device), device);
      // With tiles, each connection is read from every tile, which is faster only if a lane holds all slots.
      if (tiles.stages == 0 && holds_all_slots(p.k)) {
        const Tiles cut = cut_for_bulk_copies(tiles, x, p.x_stride, p.tokens, device);
        if (cut.stages > 0 && TilePlaces::of(cut).fit(cut)) tiles = cut;
      }
      if (tiles.stages > 0) kernel = sddmm_bulk_kernel(p, device, tiles);
    }
    const SddmmShares all = shares_of<T>(p, pairs, held, whole, tiles.stages > 0, device);
    const int64_t slots = ceil_div(p.k, all.slot_parts);
    const SddmmLaunch args{p,
                           tiles,
                           all.blocks,
                           all.shares.rows_per_part,
                           all.slot_parts,
                           slots,
                           partial,
                           pairs_aligned(static_cast<const T*>(p.grad), p.grad_stride, p.tokens),
                           slots_aligned(p.k, p.index, partial) && slots % kSlotVector == 0};
    launch("sddmm", kernel, all.shares.row_parts * all.slot_parts, all.shares.token_parts, device.threads,
           tiles.bytes(), stream, args);
  });
}

}  // namespace

int64_t sddmm_parts(const Sddmm& p, const Device& device) {
  if (p.tokens == 0 || p.d_in == 0 || p.d_out * p.k == 0) return 0;
  int64_t parts = sddmm_rows_parts(p, device);
  if (parts > 0) return parts;
  with_element("sddmm", p.dtype, [&](auto element) {
    using T = decltype(element);
    with_held_of<T>(p, device, [&](auto pairs, auto held, auto whole) {
      parts = shares_of<T>(p, pairs, held, whole, false, device).shares.token_parts;
    });
  });
  return parts;
}

void sddmm(const Sddmm& p, const Device& device, void* stream) {
  const int64_t count = p.d_out * p.k;
  if (count == 0) return;
  const int64_t parts = sddmm_parts(p, device);
  float* partial = parts == 1 ? p.out : p.partial;
  if (sddmm_rows_parts(p, device) > 0) {
    sddmm_rows(p, partial, device, stream);
  } else if (parts > 0) {
    with_element("sddmm", p.dtype, [&](auto element) { run<decltype(element)>(p, partial, device, stream); });
  }
  if (parts == 1) return;
  const int64_t threads = std::min<int64_t>(device.threads, kSumPartsThreads);
  launch("sddmm", sum_parts_kernel, ceil_div(count, kWarp), 1, threads, threads * sizeof(float), stream,
         SumPartsLaunch{partial, p.out, parts, count});
}

}  // namespace neuroada::cuda
