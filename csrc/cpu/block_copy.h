// The copy of a block of W, interleaved with the GEMM of the previous block: its memory latency is hidden
// behind work of the FMA units.
#pragma once

#include "product_job.h"

namespace neuroada::cpu::NEUROADA_ISA {

// Source and target as `rows` runs of `lines` lines. A Weight defines a line: kLine elements of the
// source, and copy_line(source, target), which writes kLineStep elements.
template <class Weight>
struct CopyJob {
  const typename Weight::Source* source = nullptr;
  typename Weight::Element* target = nullptr;
  int64_t source_step = 0, target_step = 0;  // from a run to the next, in elements
  int64_t rows = 0, lines = 0;
};

template <class Weight>
class BlockCopy {
 public:
  static constexpr bool kIdle = false;
  static constexpr int64_t kCells = 16;

  BlockCopy() = default;
  BlockCopy(const Weight& weight, const CopyJob<Weight>& job) : weight_(&weight), job_(job) {
    if (job.lines == 0) job_.rows = 0;
  }

  // Sets how much each step() copies, so that a copy that has not begun is done after `steps` steps, and prefetches
  // the first run.
  void share_out(int64_t steps) {
    lines_per_step_ = steps > 0 ? ceil_div(job_.rows * job_.lines, steps) : 0;
    for (int64_t line = 0; line < job_.lines && job_.rows > 0; ++line) {
      weight_->template prefetch_line<kL1>(job_.source + line * Weight::kLine);
    }
  }

  inline __attribute__((always_inline)) void step() {
    for (int64_t n = lines_per_step_; n > 0 && job_.rows > 0; --n) copy_line<1, kL1>();
  }

  void finish() {
    while (job_.rows > 0) copy_line<4, kL2>();
  }

 private:
  // Locality argument of __builtin_prefetch. Interleaved with a GEMM, whose steps leave time for memory, lines go to L1
  // only: rows a power of two apart map to the same sets of L2 and would evict what the forward pass reads; for dx it
  // makes no difference. finish(), which does not pause, soon uses up what L1 holds: its lines go to L2.
  static constexpr int kL1 = 0, kL2 = 2;

  const Weight* weight_ = nullptr;
  CopyJob<Weight> job_;
  int64_t line_ = 0, lines_per_step_ = 0;

  // Copies a line and prefetches the one at the same place `runs_ahead` runs later.
  template <int64_t runs_ahead, int locality>
  inline __attribute__((always_inline)) void copy_line() {
    const auto* source = job_.source + line_ * Weight::kLine;
    if (job_.rows > runs_ahead) weight_->template prefetch_line<locality>(source + runs_ahead * job_.source_step);
    weight_->copy_line(source, job_.target + line_ * Weight::kLineStep);
    if (++line_ == job_.lines) {
      line_ = 0;
      --job_.rows;
      job_.source += job_.source_step;
      job_.target += job_.target_step;
    }
  }
};

}  // namespace neuroada::cpu::NEUROADA_ISA
