// Fibers: the threads of a CTA on one CPU thread, which switches to another fiber when one waits. For ThreadSanitizer,
// only the barriers below order what fibers do.
#pragma once

#include <cstdint>
#include <functional>

namespace neuroada::host_cuda {

struct Fiber;

struct FiberQueue {
  Fiber* first = nullptr;
  Fiber* last = nullptr;
};

[[noreturn]] void stop(const char* message);

// Runs body(0), body(1), ... to body(count - 1), each as a fiber, in an order that differs between calls and repeats
// between processes. If all fibers wait, that is a deadlock and stops the program.
void run_fibers(unsigned count, const std::function<void(unsigned)>& body);

// The running fiber's own data, or null.
void* fiber_data();
void set_fiber_data(void* data);

// Suspends the running fiber until another calls wake_all_at for `place`.
void wait_at(const void* place);
void wake_all_at(const void* place);

// Actions before a release of `place` happen before those after an acquire of it.
void release(const void* place);
void acquire(const void* place);

class Barrier {
 public:
  explicit Barrier(unsigned threads) : threads_(threads) {}
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;

  void arrive_and_wait();

  // The same without ordering memory between the threads.
  void meet();

 private:
  friend class Warp;
  unsigned threads_, arrived_ = 0, turn_ = 0;
  FiberQueue waiting_;
  char order_[2] = {};  // alternate: a fiber that leaves late must not synchronise with actions after the barrier
};

// A warp's shuffles. As on a GPU, they do not order memory.
class Warp {
 public:
  static constexpr unsigned kLanes = 32;

  // Returns every lane's word, once every lane has given its own.
  const uint32_t* exchange(unsigned lane, uint32_t word);
  void sync() { barrier_.arrive_and_wait(); }

 private:
  Barrier barrier_{kLanes};
  uint32_t words_[2][kLanes];  // alternate: a lane overwrites one only after all have read it
};

}  // namespace neuroada::host_cuda
