// The launcher of merge.cuh.
#include "launch.h"
#include "merge.cuh"

namespace neuroada::cuda {
namespace {

template <class T>
auto kernel_of(MergeMode mode) {
  switch (mode) {
    case MergeMode::merge: return merge_kernel<T, MergeMode::merge>;
    case MergeMode::gather: return merge_kernel<T, MergeMode::gather>;
    case MergeMode::patch: return merge_kernel<T, MergeMode::patch>;
    default: return merge_kernel<T, MergeMode::restore>;
  }
}

}  // namespace

void merge(const Merge& p, const Device& device, void* stream) {
  if (p.d_out * p.k == 0) return;
  const int64_t blocks = ceil_div(p.d_out * p.k, device.threads);
  with_element("merge", p.dtype, [&](auto element) {
    launch("merge", kernel_of<decltype(element)>(p.mode), blocks, 1, device.threads, 0, stream, p);
  });
}

}  // namespace neuroada::cuda
