// The four modes of the kernel on the chosen entries of W; columns out of range; and the rounding of the kernels,
// tested by patch on single values.
#include "merge_checks.h"
#include "run_cuda.h"
#include "values16.h"

using namespace neuroada;
using namespace neuroada::testing;

namespace {

constexpr cuda::Device kDevice{64 << 10, 2, 64, 1 << 20};

template <class T>
void run_mode(const Problem<T>& p, MergeMode mode, Matrix<T>& weight, Matrix<T>& original) {
  cuda::merge(merge_problem(p, mode, weight, original), kDevice, nullptr);
}

// A column that is out of range is a slot without a connection: nothing is read or written through it.
template <class T>
void columns_out_of_range_are_no_connections() {
  Random random(3);
  Problem<T> problem({9, 13, 37, 3, IndexKind::ragged, false, Base::separate}, random);
  for (int64_t j = 0; j < 37; j += 2) {
    const int32_t strange[] = {13, -2, 1 << 30};
    if (problem.index(j, j % 3) < 0) problem.index(j, j % 3) = strange[j / 2 % 3];
  }
  Problem<T> without = problem;
  for (int64_t j = 0; j < 37; ++j) {
    for (int64_t s = 0; s < 3; ++s) {
      if (without.index(j, s) < 0 || without.index(j, s) >= 13) without.index(j, s) = -1;
    }
  }
  const Outputs<double> expected = reference(without);
  const Outputs<T> outputs = run(without, kDevice);
  check_outputs(outputs, expected, std::string(dtype_name<T>()) + ", without strange columns");

  Matrix<T> weight = problem.weight, original(37, 3), out(9, 37);
  const Matrix<float> grad_delta = run_sddmm(problem, kDevice);
  cuda::bypass_fwd({dtype_of<T>(), 9, 13, 37, 3, problem.x.data(), 13, problem.index.data(), problem.delta.data(),
                    problem.base.data(), 37, nullptr, out.data(), 37},
                   kDevice, nullptr);
  run_mode(problem, MergeMode::merge, weight, original);
  const std::string where = std::string(dtype_name<T>()) + ", strange columns";
  check_rounded(out, expected.out, where + ": bypass_fwd");
  check_rounded(grad_delta, expected.grad_delta, where + ": sddmm");
  check_rounded(weight, expected.weight, where + ": weight");
  check_rounded(original, expected.original, where + ": original");
}

// The shim rounds as dtype.h does, which tests/cpp/test_dtype.cpp tests. Here: patch rounds W + delta once, to nearest
// with ties to even. The values are delta, W is zero.
template <class T>
void patch_rounds_to_nearest_even() {
  constexpr size_t kStep = 61;  // of all values; every one would take minutes under ThreadSanitizer
  const std::vector<float> all = values_to_round<T>();
  std::vector<float> values;
  for (size_t i = 0; i < all.size(); i += kStep) values.push_back(all[i]);
  values.resize(values.size() / 64 * 64);
  const int64_t d_out = static_cast<int64_t>(values.size()) / 64;
  std::vector<int32_t> index(values.size());
  for (size_t e = 0; e < values.size(); ++e) index[e] = static_cast<int32_t>(e % 64);
  Matrix<T> weight(d_out, 64), original(d_out, 64);
  std::memset(original.data(), 0, values.size() * sizeof(T));
  cuda::merge(
      {dtype_of<T>(), MergeMode::patch, 64, d_out, 64, weight.data(), 64, index.data(), values.data(), original.data()},
      kDevice, nullptr);
  for (size_t e = 0; e < values.size(); ++e) {
    const double rounded = widen(weight.data()[e]), expected = nearest<T>(values[e]);
    CHECK(same_value(rounded, expected), std::string(dtype_name<T>()) + " of " + std::to_string(values[e]));
  }
}

}  // namespace

int main() {
  each_cuda_dtype([](auto element) {
    using T = decltype(element);
    check_merge_modes<T>(dtype_name<T>(), &run_mode<T>);
    columns_out_of_range_are_no_connections<T>();
    if constexpr (sizeof(T) == 2) patch_rounds_to_nearest_even<T>();
  });
  return exit_status();
}
