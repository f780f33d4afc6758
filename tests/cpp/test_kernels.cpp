// Compares every kernel with its formula on small shapes, in every dtype and instruction set that runs here.
#include <initializer_list>
#include <utility>

#include "run_cpu.h"

using namespace neuroada::testing;

namespace {

template <class T>
void check_case(const Case& c, uint64_t seed) {
  Random random(seed);
  const Problem<T> problem(c, random);
  const Outputs<double> expected = reference(problem);
  each_isa([&](const neuroada::cpu::Kernels& kernels) {
    for (int64_t threads : {1, 5}) {
      check_outputs(run(problem, kernels, sequential(threads)), expected, label<T>(kernels) + ", " + c.name());
    }
  });
}

void check_case(const Case& c, uint64_t seed) {
  each_dtype([&](auto element) { check_case<decltype(element)>(c, seed); });
}

constexpr std::pair<int64_t, int64_t> kWeights[] = {{1, 1},  {1, 5},   {5, 1},    {13, 7},
                                                    {7, 13}, {64, 48}, {67, 101}, {131, 61}};
constexpr IndexKind kIndexKinds[] = {IndexKind::distinct, IndexKind::ragged, IndexKind::empty_rows,
                                     IndexKind::one_column};

// The combinations of bias, base and strides alternate over the shapes.
void formulas_hold_over_shapes() {
  int64_t turn = 0;
  for (const auto& [d_in, d_out] : kWeights) {
    for (int64_t k : {int64_t{1}, int64_t{2}, int64_t{8}, int64_t{20}, d_in}) {
      for (int64_t tokens : {0, 1, 17, 33, 200}) {
        for (IndexKind index : kIndexKinds) {
          if (k > d_in || (tokens == 200 && k > 20)) continue;
          ++turn;
          const Base base = static_cast<Base>(turn % 3);
          check_case({tokens, d_in, d_out, k, index, turn % 2 == 0, base, turn % 5 < 2 ? turn % 5 * 3 : 0}, turn);
        }
      }
    }
  }
}

void formulas_hold_for_each_way_to_hand_over_the_output() {
  for (bool bias : {false, true}) {
    for (Base base : {Base::none, Base::separate, Base::out}) {
      for (int64_t gap : {0, 1, 16}) check_case({17, 37, 41, 3, IndexKind::ragged, bias, base, gap}, 1);
    }
  }
}

// More than kMostChunks * kChunkTokens tokens, so that a chunk of SDDMM is several of the longest blocks.
void formulas_hold_for_many_tokens() {
  check_case({2100, 19, 23, 2, IndexKind::ragged, true, Base::separate, 1}, 2);
  check_case({2049, 3, 33, 1, IndexKind::one_column}, 3);
}

// More columns or rows than fit in L2 when a block of tokens is staged.
void formulas_hold_for_wide_weights() {
  check_case({45, 2100, 13, 20, IndexKind::ragged, true, Base::out, 1}, 6);
  check_case({45, 67, 2100, 2, IndexKind::ragged, true, Base::separate, 1}, 7);
  check_case({17, 2100, 50, 2, IndexKind::ragged, true, Base::separate, 1}, 11);
  check_case({5, 31, 4200, 1, IndexKind::ragged, false, Base::none}, 12);
  check_case({130, 35000, 5, 1, IndexKind::ragged, true, Base::none}, 13);
  check_case({130, 5, 35000, 1, IndexKind::ragged, true, Base::none}, 14);
}

// Several blocks of tokens, of rows and of cells at once, each with a remainder.
void formulas_hold_across_blocks_of_the_product() {
  check_case({300, 531, 410, 3, IndexKind::ragged, true, Base::none, 1}, 8);
  check_case({129, 512, 384, 1, IndexKind::distinct, false, Base::none}, 9);
  // W is read in place, in float32 at least.
  check_case({29, 512, 384, 2, IndexKind::distinct, true, Base::none}, 10);
  check_case({63, 512, 1024, 2, IndexKind::distinct, true, Base::none}, 15);
  check_case({60, 550, 1100, 3, IndexKind::ragged, true, Base::none, 1}, 16);
}

void formulas_hold_for_empty_sizes() {
  for (int64_t tokens : {0, 3}) {
    for (int64_t d_in : {0, 5}) {
      for (int64_t d_out : {0, 5}) {
        for (int64_t k : {0, 2}) check_case({tokens, d_in, d_out, k, IndexKind::distinct, true, Base::separate}, 4);
      }
    }
  }
}

}  // namespace

int main() {
  formulas_hold_over_shapes();
  formulas_hold_for_each_way_to_hand_over_the_output();
  formulas_hold_for_many_tokens();
  formulas_hold_for_wide_weights();
  formulas_hold_across_blocks_of_the_product();
  formulas_hold_for_empty_sizes();
  return exit_status();
}
