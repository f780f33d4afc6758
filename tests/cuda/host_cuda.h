// Runs CUDA device code on the CPU: a fiber for each thread of a CTA, a barrier for __syncthreads, slots for the
// shuffles of a warp. CTAs run one after another, each with shared memory full of NaN, allocated to the byte. So
// AddressSanitizer reports a wrong index, ThreadSanitizer a missing barrier, and reads of unwritten memory make sums
// wrong.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <new>

#include "host_fibers.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace neuroada::host_cuda {

struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

constexpr int kLanes = Warp::kLanes;

struct Cta {
  explicit Cta(unsigned threads) : barrier(threads), warps(threads / kLanes) {}
  Barrier barrier;
  std::deque<Warp> warps;
  void* shared = nullptr;
  size_t shared_bytes = 0;
};

struct Self {
  Cta* cta = nullptr;
  Dim3 thread, block, block_dim, grid_dim;
  std::shared_ptr<void> asynchronous;  // state of a thread in host_hopper.h
};

inline Self& self() { return *static_cast<Self*>(fiber_data()); }

inline void check_aligned(const void* pointer, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignment != 0) stop("a misaligned vector access");
}

inline void* shared_memory(size_t alignment) {
  check_aligned(self().cta->shared, alignment);
  return self().cta->shared;
}

// Runs `kernel` for every CTA of the grid.
inline void launch(Dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel) {
  if (threads % kLanes != 0 || threads == 0 || grid.x == 0 || grid.y == 0) stop("an invalid launch");
  constexpr std::align_val_t kAlignment{1024};
  Cta cta(threads);
  cta.shared_bytes = shared_bytes;
  cta.shared = ::operator new(shared_bytes, kAlignment);
  run_fibers(threads, [&](unsigned thread) {
    Self self{&cta, {thread}, {}, {threads}, grid, nullptr};
    set_fiber_data(&self);
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        self.block = {x, y};
        if (thread == 0) std::memset(cta.shared, 0xff, shared_bytes);
        cta.barrier.arrive_and_wait();
        kernel();
        cta.barrier.arrive_and_wait();
      }
    }
  });
  ::operator delete(cta.shared, kAlignment);
}

inline Warp& warp() { return self().cta->warps[self().thread.x / kLanes]; }
inline const uint32_t* exchange(uint32_t word) { return warp().exchange(self().thread.x % kLanes, word); }

template <class T>
T shuffle(T value, unsigned lane) {
  static_assert(sizeof(T) == sizeof(uint32_t));
  uint32_t word;
  std::memcpy(&word, &value, sizeof(word));
  word = exchange(word)[lane];
  std::memcpy(&value, &word, sizeof(word));
  return value;
}

}  // namespace neuroada::host_cuda

#define threadIdx ::neuroada::host_cuda::self().thread
#define blockIdx ::neuroada::host_cuda::self().block
#define blockDim ::neuroada::host_cuda::self().block_dim
#define gridDim ::neuroada::host_cuda::self().grid_dim

inline void __syncthreads() { ::neuroada::host_cuda::self().cta->barrier.arrive_and_wait(); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return neuroada::host_cuda::shuffle(value, static_cast<unsigned>(lane));
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return neuroada::host_cuda::shuffle(value, threadIdx.x % neuroada::host_cuda::kLanes ^ static_cast<unsigned>(mask));
}

inline unsigned __ballot_sync(unsigned, bool predicate) {
  const uint32_t* given = neuroada::host_cuda::exchange(predicate);
  unsigned mask = 0;
  for (int lane = 0; lane < neuroada::host_cuda::kLanes; ++lane) mask |= given[lane] << lane;
  return mask;
}

// The lanes that have the same value.
inline unsigned __match_any_sync(unsigned, int value) {
  const uint32_t* given = neuroada::host_cuda::exchange(static_cast<uint32_t>(value));
  unsigned mask = 0;
  for (int lane = 0; lane < neuroada::host_cuda::kLanes; ++lane) {
    mask |= unsigned{given[lane] == static_cast<uint32_t>(value)} << lane;
  }
  return mask;
}

inline void __syncwarp() { neuroada::host_cuda::warp().sync(); }

template <class T>
T atomicAdd(T* to, T value) {
  return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}

inline int __popc(unsigned mask) { return __builtin_popcount(mask); }
inline int __ffs(int mask) { return __builtin_ffs(mask); }
