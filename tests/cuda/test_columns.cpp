// The kernel that copies columns of x: every parity of rows and addresses, and columns outside x.
#include "columns_problem.h"
#include "run_cuda.h"

using namespace neuroada;
using namespace neuroada::testing;

namespace {

// So few SMs that a warp has many rows, or so many that it has the fewest.
constexpr cuda::Device kFew{0, 1, 64}, kMany{0, 1000, 32};

template <class T>
void check_columns(int64_t tokens, int64_t d_in, const std::vector<int32_t>& columns, Random& random) {
  const ColumnsProblem<T> p(tokens, d_in, columns, random);
  for (const cuda::Device& device : {kFew, kMany}) {
    const bool made = p.is_made_by([&](Matrix<T>& out) {
      cuda::columns({dtype_of<T>(), tokens, d_in, p.count(), p.x.data(), p.x.stride(), columns.data(), out.data()},
                    device, nullptr);
    });
    CHECK(made, std::string(dtype_name<T>()) + ", " + std::to_string(tokens) + " tokens, " + std::to_string(p.count()) +
                    " of " + std::to_string(d_in) + " columns, " + std::to_string(device.multiprocessors) +
                    " multiprocessors");
  }
}

template <class T>
void columns_are_copied_as_they_are() {
  for (int64_t d_in : {1, 2, 63, 64, 200}) {
    Random random(static_cast<uint64_t>(d_in));
    for (int64_t tokens : {0, 1, 2, 7, 8, 150}) {
      for (int64_t draws = 0; draws < 4; ++draws) check_columns<T>(tokens, d_in, draw_columns(d_in, random), random);
    }
  }
}

// As many columns as fill a strip of a warp, one fewer and one more.
template <class T>
void strips_end_at_any_column() {
  Random random(1);
  for (int64_t count : {1, 2, 63, 64, 65, 127, 128, 129}) {
    std::vector<int32_t> columns(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) columns[static_cast<size_t>(i)] = static_cast<int32_t>(2 * i);
    for (int64_t draws = 0; draws < 4; ++draws) check_columns<T>(17, 2 * count - 1, columns, random);
  }
}

// Nothing is read through such columns; x ends where nothing may be read, see matrix.h.
template <class T>
void columns_that_x_lacks_are_zero() {
  Random random(2);
  check_columns<T>(9, 13, {13, 0, -1, 12, INT32_MAX, 5, INT32_MIN}, random);
  check_columns<T>(9, 0, {0, -1, 1}, random);
}

}  // namespace

int main() {
  each_cuda_dtype([](auto element) {
    using T = decltype(element);
    columns_are_copied_as_they_are<T>();
    strips_end_at_any_column<T>();
    columns_that_x_lacks_are_zero<T>();
  });
  return exit_status();
}
