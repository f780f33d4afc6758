// The launchers of bypass_bwd_input.cuh.
#include "bypass_bwd_input.cuh"
#include "launch.h"
#include "order_plan.cuh"

namespace neuroada::cuda {
namespace {

// Each part of the columns stages all of grad, so there is one, unless there are fewer blocks of tokens than SMs.
int64_t column_parts(int64_t blocks, int64_t threads, const Device& device) {
  const int64_t most = std::clamp<int64_t>(kSplits * kWarp / threads, 1, device.multiprocessors);
  return std::clamp<int64_t>(device.multiprocessors / blocks, 1, most);
}

// The most connections of a light column, far more than the mean. If lanes outnumber columns the limit is low, as warps
// read heavy columns faster then. A multiple of four, for whole quads, packed or not: a plan's order serves both.
int32_t light_of(int64_t d_in, int64_t live) {
  constexpr int64_t kLight = 32, kFewColumns = 2 * kMaxThreads;
  const int64_t light = d_in < kFewColumns ? kLight : std::max(kLight, ceil_div(live, d_in) * 2);
  return static_cast<int32_t>(ceil_div(light, 4) * 4);
}

// Mean connections per column from which spreading them over the banks pays: fewer leave little to choose.
constexpr int64_t kLeastSpread = 4;

// Mean connections per column below which rounds without connections are skipped, for which the tile of sums must be
// cleared: at a mean of two, every seventh column has none.
constexpr int64_t kFewConnections = 2;

// The shortest mask of low bits that covers `most`.
uint32_t mask_of(int32_t most) {
  uint32_t mask = 1;
  while (mask < static_cast<uint32_t>(most)) mask = mask << 1 | 1;
  return mask;
}

// The most shared memory that ordering may take: two CTAs run on an SM, or one if columns have many kinds. The
// connections per column that fit are far fewer than the 2048 turns that spread_over_banks can count.
int64_t most_order_bytes(const ColumnEntries& entries) {
  constexpr int64_t kHalf = 112 << 10;
  return SortKeys::by_tile(entries) ? 2 * kHalf : kHalf;
}

// The kernel, its tiles, and its threads per CTA.
struct Form {
  Tiles tiles;
  KernelOf<BypassBwdInputLaunch> kernel;
  int64_t threads;
  OutTile out{};
  int32_t part = 0;  // column positions per CTA if neurons come in bulk-copied tiles

  // Whether sums have a tile of their own; with several tiles of neurons, they reuse the memory of one.
  bool sums_behind_tile() const { return out.width > 0 && part == 0; }
  // After the sums, 16 bytes for the counters of SharedRounds.
  int64_t bytes() const { return tiles.bytes() + (sums_behind_tile() ? out.bytes() + 16 : 0); }
};

bool writes_vectors(const BypassBwdInput& p) { return aligned8(p.out) && (p.tokens <= 1 || p.out_stride % 4 == 0); }

// Groups of columns whose sums fit after the tile of all neurons and one stage: as few and as even as possible. A
// float32 base is best read by lanes with adjacent columns, and groups of fewer columns than threads leave warps idle:
// these cases use no groups.
Form with_groups(Form form, const BypassBwdInput& p, const Device& device) {
  const int64_t quads = device.shared_bytes / 16 - form.tiles.stride - 1 - 1, columns = form.tiles.columns;
  const int64_t positions = ceil_div(p.d_in, kWindow) * kWindow, room = (quads - columns) / kWindow * kWindow;
  if (p.base != nullptr || room < std::min(positions, 2 * form.threads)) return form;
  const int64_t width = ceil_div(ceil_div(positions, ceil_div(positions, room)), kWindow) * kWindow;
  form.out.width = static_cast<int32_t>(width);
  form.out.vectors = writes_vectors(p);
  form.tiles.stages = static_cast<int32_t>(std::clamp<int64_t>((quads - width) / columns, 1, kMostStages));
  // After a round without connections, no round has any, if each number of connections is a kind of its own.
  const bool apart = light_of(p.d_in, p.live) < SortKeys::kOfOne - 2,
             sparse = apart && p.live < kFewConnections * p.d_in;
  form.kernel = bypass_bwd_input_bulk_kernel(p, sparse ? BulkForm::sparse_groups : BulkForm::groups);
  return form;
}

// Parts of the columns whose sums fit into a CTA's registers, as few and as even as possible, and in them windows that
// fit into a tile.
Form with_parts(Form form, const BypassBwdInput& p) {
  const int64_t most = form.threads * kKeptRounds, room = form.tiles.width / kWindow * kWindow;
  form.part = static_cast<int32_t>(most);
  if (p.base != nullptr || room == 0) return form;
  const int64_t positions = ceil_div(p.d_in, kWindow) * kWindow;
  for (int64_t parts = ceil_div(positions, most);; ++parts) {
    const int64_t part = ceil_div(positions, parts), windows = ceil_div(part, room);
    const int64_t width = ceil_div(ceil_div(part, windows), kWindow) * kWindow;
    if (width * windows > most) continue;
    form.part = static_cast<int32_t>(width * windows);
    form.out.width = static_cast<int32_t>(width);
    form.out.vectors = writes_vectors(p);
    return form;
  }
}

template <class T>
Form form_of(const BypassBwdInput& p, const Device& device) {
  const T* grad = static_cast<const T*>(p.grad);
  const Tiles tiles = choose_tiles("bypass_bwd_input", grad, p.grad_stride, p.tokens, p.d_out, device);
  if constexpr (sizeof(T) == 2) {
    const Tiles whole = with_bulk_copies(tiles, grad, p.grad_stride, p.tokens, device);
    // There are registers for twice the threads, since loads in flight take none.
    const int64_t threads = 2 * device.threads;
    if (whole.stages > 0) {
      return with_groups({whole, bypass_bwd_input_bulk_kernel(p, BulkForm::whole), threads}, p, device);
    }
    const Tiles cut = cut_for_bulk_copies(tiles, grad, p.grad_stride, p.tokens, device);
    if (cut.stages > 0) return with_parts({cut, bypass_bwd_input_bulk_kernel(p, BulkForm::tiles), device.threads}, p);
  }
  return {tiles, tiles.single() ? bypass_bwd_input_kernel<T, true, false> : bypass_bwd_input_kernel<T, false, false>,
          device.threads};
}

template <class T>
ColumnEntries entries_of(const BypassBwdInput& p, const Form& form) {
  const Tiles& tiles = form.tiles;
  const int64_t positions = ceil_div(p.d_in, kWindow) * kWindow;
  const int64_t lists = tiles.stages > 0 ? ceil_div(p.d_out, tiles.width) : 1;
  const uint32_t place_mask = kPacks<T> && tiles.stages > 0 ? mask_of(tiles.zero) : 0;
  const int32_t light = light_of(p.d_in, ceil_div(p.live, lists));
  const int32_t window = form.out.width > 0 ? form.out.width : kWindow;
  return {p.scratch, positions, light, static_cast<int32_t>(lists), place_mask, window};
}

// Number of CTAs that share the columns.
int64_t parts_of(const Form& form, const ColumnEntries& entries, int64_t blocks, const Device& device) {
  if (form.part > 0) return ceil_div(entries.positions, form.part);
  const int64_t parts = column_parts(blocks, form.threads, device);
  return form.out.width > 0 ? std::min(parts, ceil_div(entries.positions, form.out.width)) : parts;
}

// The arguments of column_entries_kernel, which runs first, with a CTA for each kWindow positions and tile.
ColumnEntriesLaunch entries_launch_of(const char* name, const BypassBwdInput& p, const Form& form,
                                      const ColumnEntries& entries, const Device& device) {
  const Tiles& tiles = form.tiles;
  if (entries.size(p.live) >= int64_t{1} << 29) {
    throw std::runtime_error(std::string(name) + ": scratch for 2^29 connections or more");
  }
  const bool places = tiles.single() || tiles.stages > 0;
  ColumnEntriesLaunch order{entries,
                            p.plan,
                            p.delta,
                            p.d_in,
                            p.live,
                            static_cast<uint32_t>(p.d_out * p.k),
                            static_cast<uint32_t>(std::max<int64_t>(p.k, 1)),
                            static_cast<int32_t>(entries.tiles == 1 ? p.d_out : tiles.width),
                            places ? tiles.zero : -1,
                            places,
                            tiles.stages > 0 && p.live >= kLeastSpread * p.d_in};
  if (order.bytes(device.threads) > most_order_bytes(entries)) order.spread = false;
  return order;
}

template <class T>
void run(const BypassBwdInput& p, const Device& device, void* stream) {
  check_width("bypass_bwd_input", p.d_in);
  const Form form = form_of<T>(p, device);
  const Tiles& tiles = form.tiles;
  const ColumnEntries entries = entries_of<T>(p, form);
  const ColumnEntriesLaunch order = entries_launch_of("bypass_bwd_input", p, form, entries, device);
  launch("column_entries", column_entries_kernel, entries.positions / kWindow, entries.tiles, device.threads,
         order.bytes(device.threads), stream, order);
  const int64_t blocks = ceil_div(p.tokens, kTokens<T>), parts = parts_of(form, entries, blocks, device);
  const int64_t token_parts = std::clamp<int64_t>(device.multiprocessors / parts, 1, blocks);
  launch("bypass_bwd_input", form.kernel, parts, token_parts, form.threads, form.bytes(), stream,
         BypassBwdInputLaunch{p, tiles, blocks, entries, form.out, form.part});
}

}  // namespace

int64_t bypass_bwd_input_entries(const BypassBwdInput& p, const Device& device) {
  if (p.tokens == 0 || p.d_in == 0) return 0;
  int64_t size = 0;
  with_element("bypass_bwd_input", p.dtype, [&](auto element) {
    using T = decltype(element);
    size = entries_of<T>(p, form_of<T>(p, device)).size(p.live);
  });
  return size;
}

void bypass_bwd_input(const BypassBwdInput& p, const Device& device, void* stream) {
  if (p.tokens == 0 || p.d_in == 0) return;
  with_element("bypass_bwd_input", p.dtype, [&](auto element) { run<decltype(element)>(p, device, stream); });
}

void order_plan(const OrderPlan& o, const Device& device, void* stream) {
  if (o.d_in == 0) return;
  check_width("order_plan", o.d_in);
  // For any grad whose rows can be bulk-copied; bfloat16 and float16 have the same order.
  BypassBwdInput p{};
  p.dtype = DType::bf16;
  p.tokens = 1;
  p.d_in = o.d_in;
  p.d_out = o.d_out;
  p.k = o.k;
  p.grad_stride = o.d_out;
  p.plan = o.plan;
  p.live = o.live;
  const Form form = form_of<BFloat16>(p, device);
  const ColumnEntries entries = entries_of<BFloat16>(p, form);
  const OrderPlanLaunch order{entries_launch_of("order_plan", p, form, entries, device), o.out};
  launch("order_plan", order_plan_kernel, entries.positions / kWindow, entries.tiles, device.threads,
         order.bytes(device.threads), stream, order);
}

}  // namespace neuroada::cuda
