// The launcher of sddmm_rows.cuh, whose kernels are for sm_90a alone.
#include "row_ring.h"
#include "sddmm_rows.cuh"
#include "sddmm_rows.h"

namespace neuroada::cuda {
namespace {

// There is a barrier per stage, and more stages of fewer rows were slower.
constexpr int64_t kFewStages = 3;

RowsForm form_of(const Sddmm& p, const Device& device) {
  const int64_t groups = ceil_div(p.d_out, kGroup * device.threads);
  return {groups <= 2 ? groups : 4, device.threads};
}

Shares share_out(const Sddmm& p, const Device& device) {
  Shares shares = form_of(p, device).share_out(p.d_out, p.tokens, device);
  const int64_t bytes = p.d_out * static_cast<int64_t>(sizeof(float));
  shares.token_parts = std::min(shares.token_parts, std::max<int64_t>(device.scratch_bytes / bytes, 1));
  return shares;
}

template <class T, int kGroups>
KernelOf<SddmmRowsLaunch> kernel_of(bool copied) {
  return copied ? sddmm_rows_kernel<T, kGroups, true> : sddmm_rows_kernel<T, kGroups, false>;
}

template <class T>
KernelOf<SddmmRowsLaunch> kernel_of(int64_t groups, bool copied) {
  return groups == 1 ? kernel_of<T, 1>(copied) : groups == 2 ? kernel_of<T, 2>(copied) : kernel_of<T, 4>(copied);
}

}  // namespace

int64_t sddmm_rows_parts(const Sddmm& p, const Device& device) {
  const int64_t d_in = std::max(p.d_in, p.whole_d_in);
  if (p.dtype == DType::f32 || p.k != 1 || p.tokens == 0 || p.d_in == 0) return 0;
  if (!suits_rows(d_in, p.d_out, device)) return 0;
  const Shares shares = share_out(p, device);
  return choose_ring<BFloat16>(d_in, shares.rows_per_part, kFewStages, device).stages >= 2 ? shares.token_parts : 0;
}

void sddmm_rows(const Sddmm& p, float* partial, const Device& device, void* stream) {
  check_width("sddmm", p.d_out);
  with_element16("sddmm", p.dtype, [&](auto element) {
    using T = decltype(element);
    const RowsForm form = form_of(p, device);
    const Shares shares = share_out(p, device);
    const T *x = static_cast<const T*>(p.x), *grad = static_cast<const T*>(p.grad);
    const bool copied = copies_in_bulk(x, p.x_stride, p.tokens, p.d_in, device) &&
                        copies_in_bulk(grad, p.grad_stride, p.tokens, p.d_out, device);
    const SddmmRowsLaunch args{p, choose_ring<T>(p.d_in, shares.rows_per_part, kFewStages, device),
                               static_cast<int32_t>(shares.rows_per_part),
                               copied || (aligned16(grad) && (p.tokens <= 1 || p.grad_stride % kGroup == 0)), partial};
    launch("sddmm", kernel_of<T>(form.groups, copied), shares.row_parts, shares.token_parts, form.threads,
           copied ? args.ring.bytes<T>() : 0, stream, args);
  });
}

}  // namespace neuroada::cuda
