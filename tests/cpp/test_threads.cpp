// The outputs have the same bits for any number of threads, on threads that run concurrently.
#include <thread>
#include <vector>

#include "run_cpu.h"

using namespace neuroada::testing;

namespace {

template <int64_t threads>
neuroada::cpu::Executor on_threads() {
  const auto run = [](int64_t tasks, void (*body)(void*, int64_t), void* context) {
    std::vector<std::thread> pool;
    for (int64_t first = 0; first < threads; ++first) {
      pool.emplace_back([=] {
        for (int64_t task = first; task < tasks; task += threads) body(context, task);
      });
    }
    for (std::thread& thread : pool) thread.join();
  };
  return {threads, run, kSmallestGrain};
}

// Real values: their sums round differently in another order, which grid values would hide.
constexpr Case kCases[] = {
    {1, 67, 131, 20, IndexKind::distinct, true, Base::separate, 0, Values::real},
    {17, 131, 257, 8, IndexKind::ragged, true, Base::out, 3, Values::real},
    {200, 67, 131, 20, IndexKind::distinct, false, Base::none, 1, Values::real},
    {200, 131, 300, 1, IndexKind::one_column, false, Base::separate, 0, Values::real},
    {45, 2100, 70, 2, IndexKind::ragged, true, Base::none, 0, Values::real},
    {45, 70, 2100, 2, IndexKind::ragged, false, Base::out, 0, Values::real},
    // One thread copies blocks of W; two read it in place, in float32.
    {120, 530, 1060, 1, IndexKind::ragged, true, Base::none, 0, Values::real},
    {2100, 19, 150, 2, IndexKind::empty_rows, true, Base::none, 0, Values::real},
};

template <class T>
void bits_do_not_depend_on_the_threads(const Case& c) {
  Random random(1);
  const Problem<T> problem(c, random);
  each_isa([&](const neuroada::cpu::Kernels& kernels) {
    const Outputs<T> one = run(problem, kernels, on_threads<1>());
    for (const auto& executor : {on_threads<2>(), on_threads<3>(), on_threads<7>()}) {
      CHECK(run(problem, kernels, executor).same_bits(one),
            label<T>(kernels) + ", " + c.name() + ", threads " + std::to_string(executor.threads));
    }
  });
}

}  // namespace

int main() {
  for (const Case& c : kCases) {
    each_dtype([&](auto element) { bits_do_not_depend_on_the_threads<decltype(element)>(c); });
  }
  return exit_status();
}
