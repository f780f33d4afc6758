// ThreadSanitizer must check the fibers, not their scheduler: this file is not instrumented, and calls no template or
// inline function, of which the linker might take the instrumented copy of another file.
#include "host_fibers.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>

#ifdef NEUROADA_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#endif
#ifdef NEUROADA_THREAD_SANITIZER
#include <sanitizer/tsan_interface.h>
#endif

namespace neuroada::host_cuda {

constexpr unsigned kMostFibers = 1024;  // threads of a CTA
constexpr size_t kStackBytes = 256 << 10, kGuardBytes = 64 << 10;

struct Fiber {
  ucontext_t context{};
  char* stack = nullptr;
  size_t stack_bytes = 0;
  void* data = nullptr;
  const void* place = nullptr;  // the place at which it waits
  Fiber* next = nullptr;        // in its queue
  unsigned number = 0;
  void* asan_stack = nullptr;
  void* tsan_fiber = nullptr;
};

namespace {

void push_front(FiberQueue& queue, Fiber* fiber) {
  if (queue.first == nullptr) queue.last = fiber;
  fiber->next = queue.first;
  queue.first = fiber;
}

void push(FiberQueue& queue, Fiber* fiber) {
  fiber->next = nullptr;
  (queue.first == nullptr ? queue.first : queue.last->next) = fiber;
  queue.last = fiber;
}

Fiber* pop(FiberQueue& queue) {
  Fiber* const fiber = queue.first;
  queue.first = fiber->next;
  return fiber;
}

// The fibers of a CPU thread: created once, and reused by each call.
struct Scheduler {
  Fiber main;
  Fiber* fibers[kMostFibers] = {};
  Fiber* running = &main;
  Fiber* previous = nullptr;
  FiberQueue ready, waiting;
  unsigned unfinished = 0;
  uint32_t random = 1;
  const std::function<void(unsigned)>* body = nullptr;
  char start_order = 0, end_order = 0;

  Scheduler() = default;
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;
  ~Scheduler();

  Fiber* fiber(unsigned number);
  void make_ready(Fiber* fiber);
  void switch_to(Fiber* to, bool ends = false);
  [[noreturn]] void stop_deadlocked() const;
  void run_another();
  void finish();
};

thread_local Scheduler scheduler;

// Completes the switch to the running fiber. AddressSanitizer reports where main's stack is only to a fiber that main
// switches to.
void arrive() {
#ifdef NEUROADA_ADDRESS_SANITIZER
  const void* stack = nullptr;
  size_t bytes = 0;
  __sanitizer_finish_switch_fiber(scheduler.running->asan_stack, &stack, &bytes);
  if (scheduler.previous == &scheduler.main) {
    scheduler.main.stack = static_cast<char*>(const_cast<void*>(stack));
    scheduler.main.stack_bytes = bytes;
  }
#endif
}

void enter() {
  arrive();
  Scheduler& s = scheduler;
  acquire(&s.start_order);
  (*s.body)(s.running->number);
  release(&s.end_order);
  s.finish();
}

// Unpoisons the stack of a finished fiber: its last function never returned.
void unpoison([[maybe_unused]] const Fiber* fiber) {
#ifdef NEUROADA_ADDRESS_SANITIZER
  __asan_unpoison_memory_region(fiber->stack, fiber->stack_bytes);
#endif
}

Scheduler::~Scheduler() {
  for (Fiber* fiber : fibers) {
    if (fiber == nullptr) continue;
#ifdef NEUROADA_THREAD_SANITIZER
    __tsan_destroy_fiber(fiber->tsan_fiber);
#endif
    unpoison(fiber);
    munmap(fiber->stack - kGuardBytes, kGuardBytes + kStackBytes);
    delete fiber;
  }
}

Fiber* Scheduler::fiber(unsigned number) {
  Fiber*& fiber = fibers[number];
  if (fiber == nullptr) {
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK;
    void* const memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE, kFlags, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) stop("no memory for a stack");
    fiber = new Fiber;
    fiber->number = number;
    fiber->stack = static_cast<char*>(memory) + kGuardBytes;
    fiber->stack_bytes = kStackBytes;
#ifdef NEUROADA_THREAD_SANITIZER
    fiber->tsan_fiber = __tsan_create_fiber(0);
    char name[] = "thread 0000";
    for (unsigned digit = sizeof(name) - 2, rest = number; rest > 0; rest /= 10) name[digit--] += rest % 10;
    __tsan_set_fiber_name(fiber->tsan_fiber, name);
#endif
  }
  unpoison(fiber);
  fiber->data = nullptr;
  fiber->asan_stack = nullptr;
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack;
  fiber->context.uc_stack.ss_size = fiber->stack_bytes;
  makecontext(&fiber->context, enter, 0);
  // If AddressSanitizer knew the stack, it would unpoison all frames at each switch.
  fiber->context.uc_stack.ss_size = 0;
  return fiber;
}

// Queues it first or last, by the bits of a xorshift (Marsaglia 2003).
void Scheduler::make_ready(Fiber* fiber) {
  random ^= random << 13;
  random ^= random >> 17;
  random ^= random << 5;
  random % 2 == 0 ? push(ready, fiber) : push_front(ready, fiber);
}

void Scheduler::switch_to(Fiber* to, [[maybe_unused]] bool ends) {
  Fiber* const from = running;
  previous = from;
  running = to;
#ifdef NEUROADA_ADDRESS_SANITIZER
  __sanitizer_start_switch_fiber(ends ? nullptr : &from->asan_stack, to->stack, to->stack_bytes);
#endif
#ifdef NEUROADA_THREAD_SANITIZER
  __tsan_switch_to_fiber(to->tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&from->context, &to->context);
  arrive();
}

[[noreturn]] void Scheduler::stop_deadlocked() const {
  unsigned at_mbarriers = 0;
  for (const Fiber* fiber = waiting.first; fiber != nullptr; fiber = fiber->next) ++at_mbarriers;
  std::fprintf(stderr, "host_cuda: of the threads of a CTA %u wait at an mbarrier, %u at another barrier\n",
               at_mbarriers, unfinished - at_mbarriers);
  stop("a deadlock");
}

void Scheduler::run_another() {
  if (ready.first == nullptr) stop_deadlocked();
  switch_to(pop(ready));
}

void Scheduler::finish() {
  --unfinished;
  if (unfinished > 0 && ready.first == nullptr) stop_deadlocked();
  switch_to(unfinished == 0 ? &main : pop(ready), true);
}

}  // namespace

void stop(const char* message) {
  std::fprintf(stderr, "host_cuda: %s\n", message);
  std::abort();
}

void run_fibers(unsigned count, const std::function<void(unsigned)>& body) {
  Scheduler& s = scheduler;
  if (s.running != &s.main) stop("a kernel launches another");
  if (count == 0 || count > kMostFibers) stop("no such number of threads");
#ifdef NEUROADA_THREAD_SANITIZER
  s.main.tsan_fiber = __tsan_get_current_fiber();
#endif
  for (unsigned i = 0; i < count; ++i) s.make_ready(s.fiber(i));
  s.unfinished = count;
  s.body = &body;
  release(&s.start_order);
  s.run_another();
  acquire(&s.end_order);
}

void* fiber_data() { return scheduler.running->data; }
void set_fiber_data(void* data) { scheduler.running->data = data; }

void wait_at(const void* place) {
  Scheduler& s = scheduler;
  s.running->place = place;
  push(s.waiting, s.running);
  s.run_another();
}

void wake_all_at(const void* place) {
  Scheduler& s = scheduler;
  FiberQueue others;
  while (s.waiting.first != nullptr) {
    Fiber* const fiber = pop(s.waiting);
    fiber->place == place ? s.make_ready(fiber) : push(others, fiber);
  }
  s.waiting = others;
}

void release([[maybe_unused]] const void* place) {
#ifdef NEUROADA_THREAD_SANITIZER
  __tsan_release(const_cast<void*>(place));
#endif
}

void acquire([[maybe_unused]] const void* place) {
#ifdef NEUROADA_THREAD_SANITIZER
  __tsan_acquire(const_cast<void*>(place));
#endif
}

void Barrier::meet() {
  if (++arrived_ < threads_) {
    push(waiting_, scheduler.running);
    scheduler.run_another();
    return;
  }
  arrived_ = 0;
  ++turn_;
  while (waiting_.first != nullptr) scheduler.make_ready(pop(waiting_));
}

void Barrier::arrive_and_wait() {
  const char* const order = &order_[turn_ % 2];
  release(order);
  meet();
  acquire(order);
}

const uint32_t* Warp::exchange(unsigned lane, uint32_t word) {
  uint32_t* const words = words_[barrier_.turn_ % 2];
  words[lane] = word;
  barrier_.meet();
  return words;
}

}  // namespace neuroada::host_cuda
