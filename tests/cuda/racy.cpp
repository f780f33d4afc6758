// What ThreadSanitizer is there to catch: a kernel whose threads read what others wrote to shared
// memory, with no barrier between.
#include <cstdio>

#include "cuda/device.cuh"

using namespace neuroada;

int main() {
  uint32_t sum = 0;
  host_cuda::launch({1, 1}, 32, 32 * sizeof(cuda::Quad), [&] {
    cuda::Quad* shared = cuda::shared_quads();
    shared[threadIdx.x].word[0] = threadIdx.x;
    const uint32_t neighbour = shared[(threadIdx.x + 1) % 32].word[0];
    if (__ballot_sync(cuda::kAllLanes, neighbour > 32) != 0 && threadIdx.x == 0) ++sum;
  });
  std::printf("%u\n", sum);
}
