// Emulates Hopper's asynchronous hardware for csrc/cuda/hopper.cuh on the CPU. Layouts are those of the PTX ISA:
// "Tensor swizzle modes" of the copies; "Shared Memory Matrix Layout", "Matrix Descriptor Format" and "Register
// Fragments" of wgmma; "mbarrier" for phases.
//
// Asynchronous operations happen at the most unfavourable time: a copy is in shared memory at once, over data that may
// still be read, and a wgmma is computed only when its group is waited for, from the contents of shared memory at that
// time.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "host_cuda.h"
#include "neuroada/dtype.h"

namespace neuroada::host_cuda {

// ---- shared memory: its addresses are 32 bits wide, and swizzled

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const char*>(pointer) - static_cast<const char*>(self().cta->shared));
}

// Exchanges the 16-byte units within rows of 16 << bits bytes by address bits 7 and up.
inline uint32_t swizzled(uint32_t address, int bits) { return address ^ (((address >> 7) & ((1u << bits) - 1)) << 4); }

inline char* shared_at(uint32_t address, size_t bytes) {
  if (address + bytes > self().cta->shared_bytes) stop("an operand reaches past the shared memory");
  return static_cast<char*>(self().cta->shared) + address;
}

// The wgmma operations that a thread has issued and not waited for; `groups` are the committed ones.
struct Products {
  std::deque<std::vector<std::function<void()>>> groups;
  std::vector<std::function<void()>> open;
  bool fenced = false;

  ~Products() {
    if (!groups.empty() || !open.empty()) stop("a thread ends with products that it has not waited for");
  }
};

struct Asynchronous {
  Products products;
  // Whether the thread has written operands without a fence.proxy.async after them.
  bool unfenced = false;
};

// Of the running thread.
inline Asynchronous& asynchronous() {
  std::shared_ptr<void>& of = self().asynchronous;
  if (of == nullptr) of = std::make_shared<Asynchronous>();
  return *static_cast<Asynchronous*>(of.get());
}

inline void check_fenced() {
  if (asynchronous().unfenced) stop("operands are written without fence.proxy.async before others are told");
}

// ---- mbarrier: counts and phase in its own 64 bits

struct BarrierWord {
  static constexpr int64_t kBias = 1 << 21;  // of the bytes that are still to come, which may be negative
  uint32_t expected, pending;
  int64_t bytes;
  uint32_t phase;

  static BarrierWord read(uint64_t word) {
    if (word >> 62 & 1) stop("an mbarrier is used that was not initialised");
    return {static_cast<uint32_t>(word & 0xfffff), static_cast<uint32_t>(word >> 20 & 0xfffff),
            static_cast<int64_t>(word >> 40 & 0x3fffff) - kBias, static_cast<uint32_t>(word >> 63)};
  }
  uint64_t word() const {
    return uint64_t{expected} | uint64_t{pending} << 20 | static_cast<uint64_t>(bytes + kBias) << 40 |
           uint64_t{phase} << 63;
  }
};

inline BarrierWord load_barrier(const uint64_t& word) {
  check_aligned(&word, sizeof(word));
  return BarrierWord::read(__atomic_load_n(&word, __ATOMIC_RELAXED));
}
inline void store_barrier(uint64_t& word, const BarrierWord& barrier) {
  __atomic_store_n(&word, barrier.word(), __ATOMIC_RELAXED);
}

// Per phase: a thread that sees a phase complete late must not synchronise with actions before arrivals at the next.
inline const char* order_of(const uint64_t& word, uint32_t phase) {
  return reinterpret_cast<const char*>(&word) + phase;
}

// For a copy this orders too much: all earlier actions of the thread that issued it, not only its bytes.
template <class Change>
void change_barrier(uint64_t& word, Change&& change) {
  BarrierWord barrier = load_barrier(word);
  release(order_of(word, barrier.phase));
  change(barrier);
  const bool complete = barrier.pending == 0 && barrier.bytes == 0;
  if (complete) {
    barrier.pending = barrier.expected;
    barrier.phase ^= 1;
  }
  store_barrier(word, barrier);
  if (complete) wake_all_at(&word);
}

inline void init_barrier(uint64_t& word, uint32_t count) {
  check_aligned(&word, sizeof(word));
  word = BarrierWord{count, count, 0, 0}.word();  // not atomic, so that unsynchronised use is a race
}

inline void arrive(uint64_t& word, uint32_t bytes) {
  check_fenced();
  change_barrier(word, [&](BarrierWord& barrier) {
    if (barrier.pending == 0) stop("more threads arrive at an mbarrier than it counts");
    --barrier.pending;
    barrier.bytes += bytes;
  });
}

inline void complete_bytes(uint64_t& word, uint32_t bytes) {
  change_barrier(word, [&](BarrierWord& barrier) { barrier.bytes -= bytes; });
}

inline void wait(uint64_t& word, uint32_t parity) {
  while (load_barrier(word).phase == parity) wait_at(&word);
  acquire(order_of(word, parity));
}

// ---- TMA

struct TensorMap {
  const char* base;
  int64_t rows, columns, stride;  // stride in bytes
  int32_t box_rows, box_columns;
};

// A matrix of 16-bit elements in boxes of 128-byte rows; refuses what the driver refuses.
inline TensorMap make_tensor_map(const char* kernel, const void* base, int64_t rows, int64_t columns, int64_t stride,
                                 int32_t box_rows, int32_t box_columns) {
  const bool valid = reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride * 2 % 16 == 0 && rows > 0 && columns > 0 &&
                     stride >= columns && box_rows > 0 && box_rows <= 256 && box_columns > 0 && box_columns <= 64 &&
                     box_columns % 8 == 0;
  if (!valid) throw std::runtime_error(std::string(kernel) + ": cuTensorMapEncodeTiled: invalid argument");
  return {static_cast<const char*>(base), rows, columns, stride * 2, box_rows, box_columns};
}

// Elements outside the matrix are zeros, and their bytes count.
inline void copy_box(void* to, const TensorMap& map, int32_t column, int32_t row, uint64_t& barrier) {
  check_aligned(to, 128);
  const uint32_t row_bytes = static_cast<uint32_t>(map.box_columns) * 2;
  for (int32_t r = 0; r < map.box_rows; ++r) {
    for (int32_t c = 0; c < map.box_columns; ++c) {
      const int64_t from_row = int64_t{row} + r, from_column = int64_t{column} + c;
      const bool inside = from_row >= 0 && from_row < map.rows && from_column >= 0 && from_column < map.columns;
      uint16_t value = 0;
      if (inside) std::memcpy(&value, map.base + from_row * map.stride + from_column * 2, sizeof(value));
      const uint32_t address = shared_address(to) + static_cast<uint32_t>(r) * row_bytes + static_cast<uint32_t>(c) * 2;
      std::memcpy(shared_at(swizzled(address, 3), sizeof(value)), &value, sizeof(value));
    }
  }
  complete_bytes(barrier, static_cast<uint32_t>(map.box_rows) * row_bytes);
}

// Number of bulk copies issued.
inline std::atomic<int64_t> bulk_copies = 0;

// Contiguous bytes, "cp.async.bulk".
inline void copy_bulk(void* to, const void* from, uint32_t bytes, uint64_t& barrier) {
  check_aligned(to, 16);
  check_aligned(from, 16);
  if (bytes == 0 || bytes % 16 != 0) stop("a bulk copy of no multiple of 16 bytes");
  bulk_copies.fetch_add(1, std::memory_order_relaxed);
  std::memcpy(shared_at(shared_address(to), bytes), from, bytes);
  complete_bytes(barrier, bytes);
}

// ---- wgmma

// An operand in shared memory as a matrix descriptor describes it.
struct Operand {
  uint32_t start, leading, stride;
  int mode;         // 0: no swizzle, 1: 128 bytes, 2: 64, 3: 32
  bool transposed;  // M or N is contiguous, and not K

  Operand(uint64_t descriptor, bool transposed)
      : start(field(descriptor, 0)),
        leading(field(descriptor, 16)),
        stride(field(descriptor, 32)),
        mode(static_cast<int>(descriptor >> 62)),
        transposed(transposed) {
    if (descriptor >> 49 & 7) stop("a matrix descriptor with a base offset");
  }

  // Bytes from the start of an element: the canonical layouts, in units of 16 bytes of 8 elements.
  // K contiguous: ((8, n), 2) units with strides ((W, stride), 1); without swizzle ((1, stride), leading).
  // M contiguous: ((W, n), (8, k)) with ((1, leading), (W, stride)); without ((-, stride), (1, leading)).
  uint32_t offset(uint32_t major, uint32_t k) const {
    const uint32_t units = mode == 0 ? 1 : 1u << (4 - mode);  // W: those of a swizzled row
    if (!transposed) {
      return major / 8 * stride + major % 8 * units * 16 + k / 8 * (mode == 0 ? leading : 16) + k % 8 * 2;
    }
    const uint32_t unit = major / 8;
    return unit / units * (mode == 0 ? stride : leading) + unit % units * 16 + major % 8 * 2 +
           k / 8 * (mode == 0 ? leading : stride) + k % 8 * units * 16;
  }

  template <class T>
  float element(uint32_t major, uint32_t k) const {
    T value;
    const uint32_t address = swizzled(start + offset(major, k), mode == 0 ? 0 : 4 - mode);
    std::memcpy(&value, shared_at(address, sizeof(value)), sizeof(value));
    return widen(value);
  }

 private:
  static uint32_t field(uint64_t descriptor, int bit) { return static_cast<uint32_t>(descriptor >> bit & 0x3fff) << 4; }
};

inline void wgmma_fence() { asynchronous().products.fenced = true; }

inline void wgmma_commit() {
  Products& products = asynchronous().products;
  products.groups.push_back(std::move(products.open));
  products.open.clear();
}

inline void wgmma_wait(size_t left) {
  Products& products = asynchronous().products;
  for (; products.groups.size() > left; products.groups.pop_front()) {
    for (const auto& product : products.groups.front()) product();
  }
  products.fenced = false;  // from here on, the thread may use the registers
}

// The part of one thread, in its own registers.
template <class T, int N, bool kRowsOfB>
void multiply(float* d, const Operand& a, const Operand& b, bool accumulate) {
  const unsigned lane = self().thread.x % kLanes, warp = self().thread.x / kLanes % 4;
  float row[2][16];
  for (uint32_t half = 0; half < 2; ++half) {
    for (uint32_t k = 0; k < 16; ++k) row[half][k] = a.element<T>(16 * warp + lane / 4 + 8 * half, k);
  }
  for (uint32_t i = 0; i < N / 2; i += i % 2 ? 3 : 1) {  // the first of two rows
    const uint32_t column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
    float sum[2] = {};
    for (uint32_t k = 0; k < 16; ++k) {
      const float other = b.element<T>(column, k);
      for (int half = 0; half < 2; ++half) sum[half] += row[half][k] * other;
    }
    for (int half = 0; half < 2; ++half) d[i + 2 * half] = accumulate ? d[i + 2 * half] + sum[half] : sum[half];
  }
}

template <class T, int N, bool kRowsOfB>
void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(sizeof(T) == 2 && N % 8 == 0 && N <= 256);
  Products& products = asynchronous().products;
  if (!products.fenced) stop("wgmma without wgmma.fence since its registers were last read");
  products.open.push_back([registers = &d[0], left = Operand(a, false), right = Operand(b, kRowsOfB), accumulate] {
    multiply<T, N, kRowsOfB>(registers, left, right, accumulate);
  });
}

}  // namespace neuroada::host_cuda
