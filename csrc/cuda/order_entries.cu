// The launcher of order_entries.cuh.
#include "launch.h"
#include "neuroada/planner.h"
#include "order_entries.cuh"

namespace neuroada::cuda {

void order_entries(const OrderEntries& p, const Device& device, void* stream) {
  if (p.live == 0) return;
  const OrderLaunch args{
      p.plan + plan_size(p.d_in, 0), p.delta, p.ordered, p.live, static_cast<uint32_t>(p.d_out * p.k),
      static_cast<uint32_t>(p.k)};
  launch("order_entries", order_entries_kernel, ceil_div(p.live, device.threads), 1, device.threads, 0, stream, args);
}

}  // namespace neuroada::cuda
