// The launcher of bypass_fwd_rows.cuh, whose kernels are for sm_90a alone.
#include "bypass_fwd_rows.cuh"
#include "bypass_fwd_rows.h"
#include "row_ring.h"

namespace neuroada::cuda {
namespace {

constexpr int64_t kFewStages = 6;

RowsForm form_of(const BypassFwd& p, const Device& device) {
  const int64_t threads = p.d_out <= kGroup * device.threads ? device.threads : 2 * device.threads;
  return {p.d_out <= kGroup * threads ? 1 : 2, threads};
}

}  // namespace

bool bypass_fwd_rows(const BypassFwd& p, const Device& device, void* stream) {
  const bool alone = p.base == nullptr && p.bias == nullptr;
  if (p.dtype == DType::f32 || p.k != 1 || !alone || !suits_rows(p.d_in, p.d_out, device)) return false;
  bool served = false;
  with_element16("bypass_fwd", p.dtype, [&](auto element) {
    using T = decltype(element);
    const RowsForm form = form_of(p, device);
    const Shares shares = form.share_out(p.d_out, p.tokens, device);
    const BypassFwdRowsLaunch args{p, choose_ring<T>(p.d_in, 0, kFewStages, device),
                                   static_cast<int32_t>(shares.rows_per_part)};
    const T* out = static_cast<const T*>(p.out);
    const bool vectors = aligned16(out) && p.d_out % kGroup == 0 && (p.tokens <= 1 || p.out_stride % kGroup == 0);
    if (args.ring.stages < 2 || !vectors ||
        !copies_in_bulk(static_cast<const T*>(p.x), p.x_stride, p.tokens, p.d_in, device)) {
      return;
    }
    launch("bypass_fwd", form.groups == 1 ? bypass_fwd_rows_kernel<T, 1> : bypass_fwd_rows_kernel<T, 2>,
           shares.row_parts, shares.token_parts, form.threads, args.ring.bytes<T>(), stream, args);
    served = true;
  });
  return served;
}

}  // namespace neuroada::cuda
