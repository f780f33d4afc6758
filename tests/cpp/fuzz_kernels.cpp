// Runs the kernels on random shapes, strides, dtypes, indices and thread counts, and the planner on
// arbitrary input:  fuzz_kernels [iterations] [seed].  Iteration i depends on seed + i only, and a failure
// prints it, so `fuzz_kernels 1 <that seed>` repeats it. Meant for AddressSanitizer: every buffer ends
// with its last element.
#include <csignal>
#include <cstdlib>

#include "columns_checks.h"
#include "largest_checks.h"
#include "merge_checks.h"
#include "plan_checks.h"
#include "run_cpu.h"

extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());

using namespace neuroada;
using namespace neuroada::testing;

namespace {

uint64_t current_seed;

void name_seed() { std::fprintf(stderr, "failed with seed %llu\n", static_cast<unsigned long long>(current_seed)); }

void name_seed_at_a_crash() {
  if (__sanitizer_set_death_callback != nullptr) {
    __sanitizer_set_death_callback(&name_seed);
    return;
  }
  for (int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT}) {
    std::signal(signal, [](int caught) {
      name_seed();
      std::signal(caught, SIG_DFL);
      std::raise(caught);
    });
  }
}

// Mostly small sizes, often at or next to a multiple of a vector or block.
int64_t draw_size(Random& random, int64_t limit) {
  if (random.one_in(3))
    return std::min(limit, (int64_t{4} << random.below(4)) * (1 + random.below(3)) + random.below(3) - 1);
  return random.below(random.one_in(4) ? limit + 1 : std::min<int64_t>(limit, 12) + 1);
}

Case draw_case(Random& random) {
  Case c{draw_size(random, 200), draw_size(random, 150), draw_size(random, 130), 0};
  c.k = random.below(std::min<int64_t>(random.one_in(8) ? 130 : 9, c.d_in + 2) + 1);
  c.index = static_cast<IndexKind>(random.below(4));
  c.bias = random.one_in(2);
  c.base = static_cast<Base>(random.below(3));
  c.gap = random.one_in(2) ? random.below(20) : 0;
  // Sometimes wider than the limit for long blocks of tokens.
  if (random.one_in(50)) {
    (random.one_in(2) ? c.d_in : c.d_out) += 2048;
    c.tokens %= 60;
    c.k %= 4;
  }
  c.values = random.one_in(2) ? Values::real : Values::grid;
  c.lead = random.one_in(3) ? random.below(8) : 0;
  return c;
}

template <class T>
void fuzz_kernels(const Case& c, Random& random) {
  const Problem<T> problem(c, random);
  const int64_t threads = 1 + random.below(9);
  each_isa([&](const cpu::Kernels& kernels) {
    const std::string where = label<T>(kernels) + ", " + c.name() + ", threads " + std::to_string(threads);
    const Outputs<T> outputs = run(problem, kernels, sequential(threads));
    if (c.values == Values::grid) {
      check_outputs(outputs, reference(problem), where);
      check_patched(problem, where, [&](const Problem<T>& p, MergeMode mode, Matrix<T>& weight, Matrix<T>& original) {
        run_mode(p, mode, weight, original, kernels, sequential(threads));
      });
    } else {
      CHECK(outputs.same_bits(run(problem, kernels, sequential(1))), where + ": not the bits of one thread");
    }
  });
}

template <class T>
void fuzz_largest(Random& random) {
  const int64_t columns = 1 + draw_size(random, 700), rows = draw_size(random, 20);
  const int64_t k = 1 + random.below(random.one_in(2) ? std::min<int64_t>(columns, 8) : columns);
  const Matrix<T> scores = draw_scores<T>(rows, columns, random);
  check_largest(scores, k, 1 + random.below(5), std::to_string(columns) + " columns");
}

template <class T>
void fuzz_columns(Random& random) {
  const int64_t d_in = 1 + draw_size(random, 300), tokens = draw_size(random, 20);
  check_columns<T>(tokens, d_in, draw_columns(d_in, random), 1 + random.below(5), random,
                   std::to_string(d_in) + " inputs");
}

int32_t draw_column(int64_t d_in, int64_t disorder, Random& random) {
  if (random.below(100) >= disorder) return static_cast<int32_t>(random.below(d_in + 1) - 1);
  if (random.one_in(2)) return static_cast<int32_t>(random.below(5) - 2 + (random.one_in(2) ? d_in : 0));
  return static_cast<int32_t>(static_cast<uint32_t>(random.next()));
}

// Any index is either counted or rejected, and if counted, has a correct plan.
void fuzz_planner(Random& random) {
  const int64_t d_in = draw_size(random, 300), d_out = draw_size(random, 40), k = random.below(6);
  const int64_t disorder = random.one_in(2) ? 0 : random.below(20);  // in percent
  std::vector<int32_t> index(static_cast<size_t>(d_out * k));
  for (int32_t& column : index) column = draw_column(d_in, disorder, random);
  const std::string where = "planner, d_in " + std::to_string(d_in) + ", d_out " + std::to_string(d_out);

  std::string error;
  const int64_t live = check_index(index.data(), d_out, k, d_in, error);
  CHECK(live == count_connections(index, d_out, k, d_in), where + ": check_index finds " + std::to_string(live));
  CHECK((live < 0) == !error.empty(), where + ": error text " + error);
  if (live >= 0) check_plan(index, d_out, k, d_in, where);
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t iterations = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1000;
  const uint64_t first_seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  name_seed_at_a_crash();
  for (uint64_t i = 0; i < iterations && failures == 0; ++i) {
    current_seed = first_seed + i;
    Random random(current_seed);
    const Case c = draw_case(random);
    constexpr DType kDTypes[] = {DType::f32, DType::f64, DType::bf16, DType::f16};
    with_dtype(kDTypes[random.below(4)], [&](auto element) { fuzz_kernels<decltype(element)>(c, random); });
    with_dtype(kDTypes[random.below(4)], [&](auto element) { fuzz_largest<decltype(element)>(random); });
    with_dtype(kDTypes[random.below(4)], [&](auto element) { fuzz_columns<decltype(element)>(random); });
    fuzz_planner(random);
  }
  if (failures > 0) name_seed();
  return exit_status();
}
