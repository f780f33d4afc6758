// A block of W, copied to where the product reads it while the block before is being multiplied: what
// waits for memory goes between what keeps the multipliers busy.
#pragma once

#include "product_job.h"

namespace neuroada::cpu::NEUROADA_ISA {

// Source and target as `rows` runs of `lines` lines. A Weight says what a line is: kLine elements of the
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

  // Lets step() copy so much, of a copy that has not begun, that it is done after `steps` of them.
  void share_out(int64_t steps) {
    lines_a_step_ = steps > 0 ? ceil_div(job_.rows * job_.lines, steps) : 0;
    for (int64_t line = 0; line < job_.lines && job_.rows > 0; ++line) {
      weight_->template prefetch_line<kFirstCache>(job_.source + line * Weight::kLine);
    }
  }

  inline __attribute__((always_inline)) void step() {
    for (int64_t n = lines_a_step_; n > 0 && job_.rows > 0; --n) copy_line<1, kFirstCache>();
  }

  void finish() {
    while (job_.rows > 0) copy_line<4, kSecondCache>();
  }

 private:
  // Where __builtin_prefetch is to put a line. Beside a product, whose steps give memory time, that is L1
  // alone: rows that lie a power of two apart would push out of the second, from the same sets of it, what the forward
  // reads; to dx it is the same. By itself a copy soon gets through what L1 has.
  static constexpr int kFirstCache = 0, kSecondCache = 2;

  const Weight* weight_ = nullptr;
  CopyJob<Weight> job_;
  int64_t line_ = 0, lines_a_step_ = 0;

  // The line in the place of this one, some runs ahead, is asked for.
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
