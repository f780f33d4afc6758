// The shim runs device code as CUDA would: the indices, shuffles and ballots, shared memory that
// starts as NaN, and a misaligned vector access that stops the program.
#include <sys/wait.h>
#include <unistd.h>

#include <set>
#include <vector>

#include "check.h"
#include "cuda/device.cuh"

using namespace neuroada;

namespace {

constexpr unsigned kThreads = 64;

void every_thread_of_the_grid_runs_once() {
  std::vector<int> seen(3 * 2 * kThreads, 0);
  host_cuda::launch({3, 2}, kThreads, 0, [&] {
    CHECK(blockDim.x == kThreads && gridDim.x == 3 && gridDim.y == 2, "wrong sizes");
    ++seen[(blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x];
  });
  for (int count : seen) CHECK(count == 1, "a thread ran " + std::to_string(count) + " times");
}

// Each lane publishes its thread index and reads those of others.
void lanes_exchange_within_their_warp() {
  std::vector<int> broadcast(kThreads), crossed(kThreads);
  std::vector<unsigned> ballots(kThreads);
  host_cuda::launch({1, 1}, kThreads, 0, [&] {
    const int own = static_cast<int>(threadIdx.x);
    broadcast[threadIdx.x] = __shfl_sync(cuda::kAllLanes, own, 5);
    crossed[threadIdx.x] = __shfl_xor_sync(cuda::kAllLanes, own, 16);
    ballots[threadIdx.x] = __ballot_sync(cuda::kAllLanes, own % 3 == 0);
  });
  for (int i = 0; i < static_cast<int>(kThreads); ++i) {
    const int first = i / 32 * 32;
    unsigned expected = 0;
    for (int lane = 0; lane < 32; ++lane) expected |= unsigned{(first + lane) % 3 == 0} << lane;
    CHECK(broadcast[i] == first + 5, "a broadcast to " + std::to_string(i));
    CHECK(crossed[i] == (i ^ 16), "an exchange at " + std::to_string(i));
    CHECK(ballots[i] == expected, "a ballot at " + std::to_string(i));
  }
}

// Also in the second CTA, which finds no values of the first.
void shared_memory_starts_as_nan() {
  host_cuda::launch({2, 1}, 32, 4 * sizeof(cuda::Quad), [] {
    cuda::Quad* shared = cuda::shared_quads();
    if (threadIdx.x < 4) CHECK(shared[threadIdx.x].word[3] == 0xffffffffu, "not poisoned");
    __syncthreads();
    if (threadIdx.x < 4) shared[threadIdx.x] = {};
  });
}

template <class F>
bool stops(F&& f) {
  const pid_t child = fork();
  if (child == 0) {
    (void)!freopen("/dev/null", "w", stderr);
    f();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

void misaligned_vectors_stop_the_program() {
  alignas(16) const unsigned char bytes[32] = {};
  CHECK(!stops([&] { cuda::load16(bytes + 16); }), "an aligned load stops");
  CHECK(stops([&] { cuda::load16(bytes + 8); }), "a misaligned load goes through");
  CHECK(stops([] { host_cuda::launch({1, 1}, 33, 0, [] {}); }), "33 threads a CTA go through");
}

// Half of the threads wait at a barrier that the others never reach.
void threads_that_wait_in_vain_stop_the_program() {
  const auto halves = [](bool together) {
    host_cuda::launch({1, 1}, kThreads, 0, [&] {
      if (together || threadIdx.x < kThreads / 2) __syncthreads();
    });
  };
  CHECK(!stops([&] { halves(true); }), "a barrier that all come to stops");
  CHECK(stops([&] { halves(false); }), "a barrier that some never come to goes through");
}

// So that a kernel that relies on one thread being first fails.
void threads_begin_in_any_order() {
  std::set<unsigned> first;
  for (int launch = 0; launch < 8; ++launch) {
    unsigned begun = 0;
    host_cuda::launch({1, 1}, kThreads, 0, [&] {
      if (atomicAdd(&begun, 1u) == 0) first.insert(threadIdx.x);
    });
  }
  CHECK(first.size() > 2, "hardly any order but one or two");
}

}  // namespace

int main() {
  // Tests that fork come first: ThreadSanitizer does not check a fork of a process that has fibers.
  misaligned_vectors_stop_the_program();
  threads_that_wait_in_vain_stop_the_program();
  threads_begin_in_any_order();
  every_thread_of_the_grid_runs_once();
  lanes_exchange_within_their_warp();
  shared_memory_starts_as_nan();
  return testing::exit_status();
}
