// Races that ThreadSanitizer must report: `cuda_racy NAME` runs a kernel in which one thread reads what another one
// writes to shared memory, without synchronisation between them.
#include <cstdio>
#include <cstring>

#include "cuda/hopper.cuh"

using namespace neuroada;

namespace {

constexpr unsigned kThreads = 64;

struct Shared {
  uint32_t words[kThreads];
  uint64_t barrier;
};

Shared& shared() { return *static_cast<Shared*>(host_cuda::shared_memory(alignof(Shared))); }
void write(unsigned place) { shared().words[place] = threadIdx.x; }

uint32_t found = 0;
void read(unsigned place) {
  if (shared().words[place] > kThreads) ++found;
}

void init_barrier(uint32_t count) {
  if (threadIdx.x == 0) host_cuda::init_barrier(shared().barrier, count);
  __syncthreads();
}

void no_barrier() {
  write(threadIdx.x);
  if (threadIdx.x == 1) read(0);
}

// On a GPU, shuffles do not order memory.
void a_shuffle_alone() {
  write(threadIdx.x);
  __shfl_sync(~0u, 1, 0);
  if (threadIdx.x == 1) read(0);
}

// Between two barriers: one thread may leave the first while others are already at the second.
void between_barriers() {
  __syncthreads();
  if (threadIdx.x == 0) write(0);
  if (threadIdx.x == 1) read(0);
  __syncthreads();
}

void between_phases() {
  init_barrier(kThreads);
  host_cuda::arrive(shared().barrier, 0);
  host_cuda::wait(shared().barrier, 0);
  if (threadIdx.x == 0) write(0);
  if (threadIdx.x == 1) read(0);
  host_cuda::arrive(shared().barrier, 0);
  host_cuda::wait(shared().barrier, 1);
}

void arrived_without_a_wait() {
  init_barrier(kThreads);
  if (threadIdx.x == 0) write(0);
  host_cuda::arrive(shared().barrier, 0);
  if (threadIdx.x == 1) read(0);
}

void a_copy_without_a_wait() {
  alignas(16) static const uint32_t from[4] = {};
  init_barrier(1);
  if (threadIdx.x == 0) {
    host_cuda::arrive(shared().barrier, sizeof(from));
    host_cuda::copy_bulk(shared().words, from, sizeof(from), shared().barrier);
  }
  if (threadIdx.x == 1) read(0);
}

void an_mbarrier_of_which_nobody_was_told() {
  if (threadIdx.x == 0) host_cuda::init_barrier(shared().barrier, 1);
  if (threadIdx.x == 0) host_cuda::arrive(shared().barrier, 0);
  __shfl_sync(~0u, 1, 0);
  if (threadIdx.x == 1) host_cuda::wait(shared().barrier, 0);
}

}  // namespace

int main(int, char** arguments) {
  const struct {
    const char* name;
    void (*kernel)();
  } all[] = {{"no_barrier", no_barrier},
             {"a_shuffle_alone", a_shuffle_alone},
             {"between_barriers", between_barriers},
             {"between_phases", between_phases},
             {"arrived_without_a_wait", arrived_without_a_wait},
             {"a_copy_without_a_wait", a_copy_without_a_wait},
             {"an_mbarrier_of_which_nobody_was_told", an_mbarrier_of_which_nobody_was_told}};
  for (const auto& racy : all) {
    if (std::strcmp(racy.name, arguments[1]) != 0) continue;
    // The more orders are run, the less a race depends on one of them.
    for (int launch = 0; launch < 16; ++launch) host_cuda::launch({1, 1}, kThreads, sizeof(Shared), racy.kernel);
    std::printf("%u\n", found);
  }
}
