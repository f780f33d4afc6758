// The bypass and the SDDMM of one slot by the kernels on a circular buffer of rows: they match the formula, with the
// same bits for any layout of x, and non-finite values only where they belong.
#include "cuda/hopper.cuh"
#include "cuda/sddmm_rows.h"
#include "nonfinite.h"
#include "run_cuda.h"

using namespace neuroada::testing;
using neuroada::BFloat16;
using neuroada::DType;
using neuroada::Half;
using neuroada::cuda::Device;
namespace cuda = neuroada::cuda;

namespace {

// 32 threads of 8 neurons each: 256 neurons are one group per thread.
Device device_of(int64_t bytes, bool bulk_copies = true) { return {bytes, 5, 32, 1 << 20, bulk_copies}; }

bool copies(const Problem<BFloat16>& problem, const Device& device) {
  const int64_t before = neuroada::host_cuda::bulk_copies;
  run_sddmm(problem, device);
  return neuroada::host_cuda::bulk_copies != before;
}

int64_t parts_of(DType dtype, const Case& c, const Device& device, int64_t whole_d_in = 0) {
  cuda::Sddmm p{};
  p.dtype = dtype;
  p.tokens = c.tokens, p.d_in = c.d_in, p.d_out = c.d_out, p.k = c.k, p.whole_d_in = whole_d_in;
  return cuda::sddmm_rows_parts(p, device);
}

template <class T>
void check_gradient(const Problem<T>& problem, const Device& device, const std::string& where) {
  CHECK(parts_of(dtype_of<T>(), problem.shape, device) > 0, where + ": by another kernel");
  check_rounded(run_sddmm(problem, device), reference(problem).grad_delta, where);
}

// Tokens below, at and above whole stages; 128 neurons up to more than a CTA has; buffers of two, three and more stages
// of one to eight rows; rows that can be bulk-copied, and others.
template <class T>
void every_form_has_the_gradient() {
  uint64_t seed = 0;
  for (int64_t d_out : {128, 136, 250, 300, 512, 1030}) {
    for (int64_t tokens : {1, 8, 9, 130}) {
      for (int64_t rows : {2, 3, 7, 40}) {
        ++seed;
        const Case c{tokens, seed % 2 ? 64 : 70, d_out,           1, static_cast<IndexKind>(seed % 4),
                     false,  Base::none,         seed % 3 ? 0 : 8};
        Random random(seed);
        const Problem<T> problem(c, random);
        const Device device = device_of(64 + rows * 2 * (c.d_in + (d_out + 15) / 16 * 16));
        check_gradient(problem, device,
                       std::string(dtype_name<T>()) + ", " + std::to_string(rows) + " rows, " + c.name());
      }
    }
  }
}

// Real values, whose sums depend on the order.
void how_x_lies_changes_no_bit() {
  uint64_t seed = 100;
  for (int64_t d_out : {136, 304, 1040}) {
    ++seed;
    Case c{130, 64, d_out, 1, IndexKind::ragged};
    c.values = Values::real;
    Random random(seed), same(seed);
    const Problem<BFloat16> problem(c, random);
    c.gap = 3;
    const Problem<BFloat16> apart(c, same);
    const Device device = device_of(64 << 10);
    CHECK(copies(problem, device), c.name() + ": is not copied");
    CHECK(!copies(apart, device), c.name() + ": is copied");
    const Matrix<float> found = run_sddmm(problem, device);
    CHECK(found.same_bits(run_sddmm(apart, device)), c.name() + ": other bits where rows are apart");
    CHECK(found.same_bits(run_sddmm(problem, device_of(8 << 10))), c.name() + ": other bits in a shorter ring");
  }
}

// The choice of the kernel is the same for the columns of x that a layer saves as for all of them.
void what_it_is_for() {
  const Device device = device_of(4096);
  const Case c{33, 64, 128, 1};
  CHECK(parts_of(DType::bf16, c, device) > 0 && parts_of(DType::f16, c, device) > 0, "16 bits");
  CHECK(parts_of(DType::f32, c, device) == 0, "float32");
  CHECK(parts_of(DType::bf16, {33, 64, 128, 2}, device) == 0, "two slots");
  CHECK(parts_of(DType::bf16, {33, 64, 120, 1}, device) == 0, "few neurons");
  CHECK(parts_of(DType::bf16, {0, 64, 128, 1}, device) == 0, "no tokens");
  CHECK(parts_of(DType::bf16, {33, 0, 128, 1}, device, 64) == 0, "no column of 64");
  CHECK(parts_of(DType::bf16, c, device_of(4096, false)) == 0, "a device without copies");
  CHECK(parts_of(DType::bf16, c, device_of(64 + 2 * 384)) > 0, "just two rows");
  CHECK(parts_of(DType::bf16, c, device_of(63 + 2 * 384)) == 0, "not quite two rows");
  CHECK(parts_of(DType::bf16, c, device_of(1 << 20), 65535) > 0, "64 columns of 65535");
  CHECK(parts_of(DType::bf16, c, device_of(1 << 20), 65536) == 0, "columns of which 16 bits do not say which");
}

// The bypass alone, and whether rows were copied for it.
template <class T>
Outputs<T> forward(const Problem<T>& problem, const Device& device, bool& copied) {
  Outputs<T> outputs = make_outputs(problem);
  outputs.out = Matrix<T>(problem.shape.tokens, problem.shape.d_out, problem.shape.gap);
  const int64_t before = neuroada::host_cuda::bulk_copies;
  run_bypass_fwd(problem, outputs, device);
  copied = neuroada::host_cuda::bulk_copies != before;
  return outputs;
}

// The same bits as the general kernel, with as many neurons as a CTA has and more; the general kernel runs if rows or
// sizes cannot be bulk-copied, or if something is added.
template <class T>
void the_bypass_has_the_bits_of_any_other_kernel() {
  uint64_t seed = 200;
  for (int64_t d_out : {128, 136, 250, 512, 1032}) {
    for (int64_t tokens : {1, 9, 130}) {
      for (int64_t gap : {0, 8, 3}) {
        for (Values values : {Values::grid, Values::real}) {
          ++seed;
          Case c{tokens, 64, d_out, 1, static_cast<IndexKind>(seed % 4), false, Base::none, gap};
          c.values = values;
          Random random(seed);
          const Problem<T> problem(c, random);
          bool copied, other;
          const Device device = device_of(seed % 2 ? 64 << 10 : 512);
          const Outputs<T> found = forward(problem, device, copied),
                           loaded = forward(problem, device_of(64 << 10, false), other);
          const std::string where = std::string(dtype_name<T>()) + ", " + c.name();
          const bool aligned = d_out % 8 == 0 && (gap != 3 || tokens == 1);
          CHECK(copied || !aligned, where + ": by another kernel");
          CHECK(!other && found.out.same_bits(loaded.out), where + ": other bits");
          if (values == Values::grid) check_rounded(found.out, reference(problem).out, where);
        }
      }
    }
  }
}

template <class T>
void what_is_not_finite_stays_where_it_belongs() {
  Random random(4);
  Problem<T> problem({33, 72, 136, 1, IndexKind::ragged}, random);
  for (int64_t j = 0; j < 136; j += 23) put(problem.grad, j % 33, j, j % 2 ? kInf : -kInf);
  for (int64_t c = 0; c < 72; c += 31) put(problem.x, c % 33, c, c % 2 ? kInf : -kInf);
  put(problem.x, 32, 70, kNaN);
  for (int64_t t = 0; t < 33; ++t) put(problem.x, t, 0, kInf);  // what a slot of -1 reads
  check_gradient(problem, device_of(8 << 10), dtype_name<T>());
  bool copied;
  check_rounded(forward(problem, device_of(8 << 10), copied).out, reference(problem).out, dtype_name<T>());
  CHECK(copied, "the bypass by another kernel");
}

}  // namespace

int main() {
  every_form_has_the_gradient<BFloat16>();
  every_form_has_the_gradient<Half>();
  how_x_lies_changes_no_bit();
  the_bypass_has_the_bits_of_any_other_kernel<BFloat16>();
  the_bypass_has_the_bits_of_any_other_kernel<Half>();
  what_it_is_for();
  what_is_not_finite_stays_where_it_belongs<BFloat16>();
  what_is_not_finite_stays_where_it_belongs<Half>();
  return exit_status();
}
