// Wrappers of sm_90a instructions: barriers that count bytes (mbarrier), bulk and tensor copies (TMA), warpgroup MMA
// (wgmma), and register reallocation between warpgroups (setmaxnreg). Quoted section names are those of the PTX ISA.
// Under NEUROADA_HOST_CUDA the tests' host_hopper.h emulates the hardware.
#pragma once

#include <type_traits>

#include "device.cuh"

#ifdef NEUROADA_HOST_CUDA
#include "host_hopper.h"
#else
#include <cuda.h>
#endif

// Only sm_90a has these instructions; for any other arch the kernels are compiled empty. The host compilation pass, in
// which no arch is defined, parses them as well.
#if defined(NEUROADA_HOST_CUDA) || !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define NEUROADA_HOPPER
#endif

namespace neuroada::cuda {

constexpr int kWarpgroup = 128;
constexpr int kSwizzle = 128;               // bytes: the width of a swizzled row of shared memory
constexpr int kSwizzleAtom = 8 * kSwizzle;  // bytes after which the pattern repeats

// The shape and strides of a matrix in global memory and the box that one copy takes, encoded.
#ifdef NEUROADA_HOST_CUDA
using TensorMap = host_cuda::TensorMap;
#else
using TensorMap = CUtensorMap;
#endif

// "mbarrier": a phase completes once `count` threads have arrived and all expected bytes have come.
struct alignas(8) Barrier {
  uint64_t state;
};

// "Matrix Descriptor Format" of wgmma, for the 128-byte swizzle. Of an operand whose K dimension is
// contiguous, `stride` is the distance in bytes from 8 rows to the next 8, and `leading` is not used.
// Of one whose M or N dimension is contiguous, `leading` is the distance from 64 of its elements to the
// next 64, and `stride` that from 8 steps of K to the next 8.
__device__ __forceinline__ uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  constexpr uint64_t kSwizzle128 = 1;
  return uint64_t{(address & 0x3ffffu) >> 4} | uint64_t{leading >> 4} << 16 | uint64_t{stride >> 4} << 32 |
         kSwizzle128 << 62;
}

#ifdef NEUROADA_HOST_CUDA

template <class Shared>
Shared& shared_as() {
  return *static_cast<Shared*>(host_cuda::shared_memory(alignof(Shared)));
}

inline uint32_t shared_address(const void* pointer) { return host_cuda::shared_address(pointer); }

inline void init_barrier(Barrier& barrier, uint32_t count) { host_cuda::init_barrier(barrier.state, count); }
inline void publish_barriers() {}
inline void arrive(Barrier& barrier) { host_cuda::arrive(barrier.state, 0); }
template <class T>
void write_operand(T* to, T value) {
  *to = value;
  host_cuda::asynchronous().unfenced = true;
}
inline void fence_operands() { host_cuda::asynchronous().unfenced = false; }
inline void arrive_expecting(Barrier& barrier, uint32_t bytes) { host_cuda::arrive(barrier.state, bytes); }
inline void wait(Barrier& barrier, uint32_t parity) { host_cuda::wait(barrier.state, parity); }

inline void prefetch(const TensorMap&) {}
inline void copy_box(void* to, const TensorMap& map, int32_t column, int32_t row, Barrier& barrier) {
  host_cuda::copy_box(to, map, column, row, barrier.state);
}

inline void copy_bulk(void* to, const void* from, uint32_t bytes, Barrier& barrier) {
  host_cuda::copy_bulk(to, from, bytes, barrier.state);
}

inline void sync_warp() {
  host_cuda::check_fenced();
  host_cuda::warp().sync();
}
template <int N>
void release_registers() {}
template <int N>
void claim_registers() {}

template <int N>
void keep_in_registers(float (&)[N]) {}

inline void wgmma_fence() { host_cuda::wgmma_fence(); }
inline void wgmma_commit() { host_cuda::wgmma_commit(); }
template <int N>
void wgmma_wait() {
  host_cuda::wgmma_wait(N);
}
template <class T, int N, bool kRowsOfB>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  host_cuda::wgmma<T, N, kRowsOfB>(d, a, b, accumulate);
}

#else

// Dynamic shared memory, whose start has the alignment that is declared here.
template <class Shared>
__device__ __forceinline__ Shared& shared_as() {
  static_assert(alignof(Shared) <= kSwizzleAtom);
  extern __shared__ __align__(1024) unsigned char neuroada_shared_atoms[];
  return *reinterpret_cast<Shared*>(neuroada_shared_atoms);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

#ifdef NEUROADA_HOPPER

__device__ __forceinline__ void init_barrier(Barrier& barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(count) : "memory");
}

// Makes initialised barriers visible to copies; the CTA's other threads need a __syncthreads as well.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

__device__ __forceinline__ void arrive_expecting(Barrier& barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

// Writes an operand that the tensor cores or a copy will read or overwrite. fence_operands must come between such a
// write and the signal of it to another thread.
template <class T>
__device__ __forceinline__ void write_operand(T* to, T value) {
  *to = value;
}
__device__ __forceinline__ void fence_operands() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Returns once the phase of this parity is complete; before the first phase, parity 1 counts as complete.
__device__ __forceinline__ void wait(Barrier& barrier, uint32_t parity) {
  uint32_t complete = 0;
  while (complete == 0) {
    asm volatile(
        "{\n"
        ".reg .pred complete;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
        "selp.b32 %0, 1, 0, complete;\n"
        "}\n"
        : "=r"(complete)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
  }
}

__device__ __forceinline__ void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Starts the copy of the box at (row, column); its bytes arrive at `barrier`.
__device__ __forceinline__ void copy_box(void* to, const TensorMap& map, int32_t column, int32_t row,
                                         Barrier& barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared_address(to)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(&barrier))
      : "memory");
}

// Starts the copy of contiguous bytes; their number and both addresses are multiples of 16.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, uint32_t bytes, Barrier& barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(&barrier))
               : "memory");
}

__device__ __forceinline__ void sync_warp() { __syncwarp(); }

template <int N>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N>
__device__ __forceinline__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// Keeps the compiler from moving or copying accumulators while a product may still write to them.
template <int N>
__device__ __forceinline__ void keep_in_registers(float (&d)[N]) {
  NEUROADA_UNROLL
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Returns once all but the last N committed groups are complete.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Operands %t0 to %t9, and eight accumulators from d[i] on.
#define NEUROADA_TEN(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define NEUROADA_EIGHT(i)                                                                                     \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define NEUROADA_SIXTY_FOUR(i)                                                                                      \
  NEUROADA_EIGHT(i), NEUROADA_EIGHT(i + 8), NEUROADA_EIGHT(i + 16), NEUROADA_EIGHT(i + 24), NEUROADA_EIGHT(i + 32), \
      NEUROADA_EIGHT(i + 40), NEUROADA_EIGHT(i + 48), NEUROADA_EIGHT(i + 56)
#define NEUROADA_WGMMA_256(type) \
  asm volatile(                                                                                                    \
      "{\n"                                                                                                        \
      ".reg .pred accumulate;\n"                                                                                   \
      "setp.ne.b32 accumulate, %130, 0;\n"                                                                         \
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type                                                 \
      " {" NEUROADA_TEN() NEUROADA_TEN(1) NEUROADA_TEN(2) NEUROADA_TEN(3) NEUROADA_TEN(4) NEUROADA_TEN(5)           \
          NEUROADA_TEN(6) NEUROADA_TEN(7) NEUROADA_TEN(8) NEUROADA_TEN(9) NEUROADA_TEN(10) NEUROADA_TEN(11)        \
      "%120,%121,%122,%123,%124,%125,%126,%127}, %128, %129, accumulate, 1, 1, 0, %131;\n"                         \
      "}\n"                                                                                                        \
      : NEUROADA_SIXTY_FOUR(0), NEUROADA_SIXTY_FOUR(64)                                                            \
      : "l"(a), "l"(b), "r"(static_cast<int32_t>(accumulate)), "n"(static_cast<int32_t>(kRowsOfB))                 \
      : "memory")

// d = a b + d, or a b: "wgmma.mma_async", m64nNk16, both operands in shared memory. A is [64, 16] with K
// contiguous. B is [16, N] with K contiguous, or its rows where kRowsOfB. "Register Fragments": lane l of
// warp w holds row 16 w + l / 4 + 8 (i / 2 % 2), column 8 (i / 4) + 2 (l % 4) + i % 2 in d[i].
template <class T, int N, bool kRowsOfB>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(N == 256 && sizeof(T) == 2, "the other shapes have no text here");
  if constexpr (std::is_same_v<T, BFloat16>) {
    NEUROADA_WGMMA_256("bf16");
  } else {
    NEUROADA_WGMMA_256("f16");
  }
}

#undef NEUROADA_WGMMA_256
#undef NEUROADA_SIXTY_FOUR
#undef NEUROADA_EIGHT
#undef NEUROADA_TEN

#endif  // NEUROADA_HOPPER
#endif  // NEUROADA_HOST_CUDA

}  // namespace neuroada::cuda
