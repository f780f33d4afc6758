// The launcher of block_entries_sm90.cuh.
#include "block_entries_sm90.cuh"
#include "launch.h"

namespace neuroada::cuda {

void block_entries(const BlockEntries& p, const Device& device, void* stream) {
  launch("block_entries", block_entries_kernel, ceil_div(ceil_div(p.d_out, kGroupNeurons) * kWarp, device.threads),
         ceil_div(p.d_in, p.width) + 1, device.threads, 0, stream, p);
}

}  // namespace neuroada::cuda
