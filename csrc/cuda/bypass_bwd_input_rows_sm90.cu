// The launcher of bypass_bwd_input_rows.cuh, whose kernels are for sm_90a alone.
#include "bypass_bwd_input_rows.cuh"
#include "bypass_bwd_input_rows.h"
#include "row_ring.h"

namespace neuroada::cuda {
namespace {

// As many slots a column as most columns have no more than. More groups or threads leave no registers for so many.
template <class T>
KernelOf<BypassBwdInputRowsLaunch> kernel_of(const BypassBwdInput& p, const RowsForm& form, const Device& device) {
  const int64_t slots = 2 * p.live <= p.d_in ? 1 : p.live <= 2 * p.d_in ? 2 : p.live <= 4 * p.d_in ? 4 : 0;
  if (form.groups == 2) return slots == 1 ? bypass_bwd_input_rows_kernel<T, 2, 1> : nullptr;
  if (slots == 1) return bypass_bwd_input_rows_kernel<T, 1, 1>;
  if (slots == 2) return bypass_bwd_input_rows_kernel<T, 1, 2>;
  return slots == 4 && form.threads == device.threads ? bypass_bwd_input_rows_kernel<T, 1, 4> : nullptr;
}

}  // namespace

bool bypass_bwd_input_rows(const BypassBwdInput& p, int32_t* served, const Device& device, void* stream) {
  // The ring has neurons along its rows, and a CTA all columns.
  if (p.dtype == DType::f32 || p.k != 1 || p.base != nullptr || !suits_rows(p.d_out, p.d_in, device)) return false;
  bool launched = false;
  with_element16("bypass_bwd_input", p.dtype, [&](auto element) {
    using T = decltype(element);
    const RowsForm form = RowsForm::of(p.d_in, device);
    const KernelOf<BypassBwdInputRowsLaunch> kernel = kernel_of<T>(p, form, device);
    const T* out = static_cast<const T*>(p.out);
    const bool vectors = aligned16(out) && p.d_in % kGroup == 0 && (p.tokens <= 1 || p.out_stride % kGroup == 0);
    Device left = device;
    left.shared_bytes -= ConnectionLists::kBytes;
    const BypassBwdInputRowsLaunch args{p, choose_ring<T>(p.d_out, kGroup, left), served};
    if (kernel == nullptr || args.ring.stages < 2 || !vectors || p.d_in > form.groups * kGroup * form.threads ||
        !copies_in_bulk(static_cast<const T*>(p.grad), p.grad_stride, p.tokens, p.d_out, device)) {
      return;
    }
    const int64_t blocks = ceil_div(p.tokens, kTokens<T>);
    launch("bypass_bwd_input", kernel, 1, std::min(device.multiprocessors, blocks), form.threads,
           args.ring.bytes<T>() + ConnectionLists::kBytes, stream, args);
    launched = true;
  });
  return launched;
}

}  // namespace neuroada::cuda
