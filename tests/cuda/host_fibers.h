// Fibers: the threads of a CTA as one thread of the CPU, which goes from one to another where they wait. To
// ThreadSanitizer what one does is in no order with what another does, but by the barriers below.
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

// Runs body(0), body(1), ... to body(count - 1), each as a fiber, in an order that is another in every call and repeats
// from process to process. Where every fiber waits, that is a deadlock and stops the program.
void run_fibers(unsigned count, const std::function<void(unsigned)>& body);

// What the running fiber has set for itself, or null.
void* fiber_data();
void set_fiber_data(void* data);

// The running fiber waits until another one wakes whoever waits at `place`.
void wait_at(const void* place);
void wake_all_at(const void* place);

// What was done before a release of `place` comes before what is done after an acquire of it.
void release(const void* place);
void acquire(const void* place);

class Barrier {
 public:
  explicit Barrier(unsigned threads) : threads_(threads) {}
  Barrier(const Barrier&) = delete;
  Barrier& operator=(const Barrier&) = delete;

  void arrive_and_wait();

  // The same for threads that learn of nothing that the others have done.
  void meet();

 private:
  friend class Warp;
  unsigned threads_, arrived_ = 0, turn_ = 0;
  FiberQueue waiting_;
  char order_[2] = {};  // by turns: who leaves one late is not to learn of what others do before they are at the next
};

// A warp's shuffles, which order no memory on a GPU either.
class Warp {
 public:
  static constexpr unsigned kLanes = 32;

  // Every lane's word, after every lane has given its own.
  const uint32_t* exchange(unsigned lane, uint32_t word);
  void sync() { barrier_.arrive_and_wait(); }

 private:
  Barrier barrier_{kLanes};
  uint32_t words_[2][kLanes];  // in turns: who writes to one again has seen all others read it
};

}  // namespace neuroada::host_cuda
