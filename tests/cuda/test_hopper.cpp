// The emulation of Hopper's hardware follows the PTX ISA: where copies put their elements, what matrix descriptors
// address, which registers hold a wgmma result, and when barriers and wgmma complete.
#include <sys/wait.h>
#include <unistd.h>

#include <string>
#include <utility>

#include "check.h"
#include "cuda/hopper.cuh"
#include "cuda/tensor_map_sm90.h"
#include "matrix.h"

using namespace neuroada;
using namespace neuroada::testing;
using cuda::Barrier;

namespace {

constexpr unsigned kThreads = cuda::kWarpgroup;

// A small integer for each element of a matrix, exact in 16 bits.
float value_at(int64_t row, int64_t column) { return static_cast<float>((row * 37 + column * 11) % 127 - 63); }

Matrix<BFloat16> numbered(int64_t rows, int64_t columns, int64_t gap) {
  Matrix<BFloat16> matrix(rows, columns, gap);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) narrow(value_at(r, c), matrix(r, c));
  }
  return matrix;
}

struct alignas(1024) Shared {
  BFloat16 tile[2][64 * 64];
  Barrier barrier, unused;
};

// "Tensor swizzle modes", 128 bytes: row r of 128 bytes stays a row, and its 16-byte unit u moves to
// u xor r mod 8. Elements outside the matrix are zeros, left of it too.
void a_box_is_swizzled_and_padded_with_zeros() {
  const Matrix<BFloat16> matrix = numbered(21, 40, 8);
  const auto map = cuda::make_tensor_map("test", DType::bf16, matrix.data(), 21, 40, matrix.stride(), 16, 64);
  for (const auto& corner : {std::pair{0, 0}, std::pair{10, 32}, std::pair{-3, -5}}) {
    const auto row = corner.first, column = corner.second;  // Clang before 16 cannot capture structured bindings
    host_cuda::launch({1, 1}, 32, sizeof(Shared), [&] {
      Shared& shared = cuda::shared_as<Shared>();
      if (threadIdx.x == 0) {
        cuda::init_barrier(shared.barrier, 1);
        cuda::arrive_expecting(shared.barrier, 16 * 128);
        cuda::copy_box(shared.tile[0], map, column, row, shared.barrier);
      }
      __syncthreads();
      cuda::wait(shared.barrier, 0);
      if (threadIdx.x != 0) return;
      for (int r = 0; r < 16; ++r) {
        for (int c = 0; c < 64; ++c) {
          const int64_t y = row + r, x = column + c;
          const bool inside = y >= 0 && y < 21 && x >= 0 && x < 40;
          const float found = widen(shared.tile[0][r * 64 + (c / 8 ^ r % 8) * 8 + c % 8]);
          CHECK(found == (inside ? value_at(y, x) : 0.0f), "row " + std::to_string(y) + ", " + std::to_string(x));
        }
      }
    });
  }
}

// The canonical layouts of "Shared Memory Matrix Layout", written out as distances in bytes.
void descriptors_address_the_canonical_layouts() {
  const auto offset = [](int mode, bool transposed, uint32_t major, uint32_t k) {
    const uint64_t descriptor =
        uint64_t{4096 >> 4} | uint64_t{512 >> 4} << 16 | uint64_t{2048 >> 4} << 32 | static_cast<uint64_t>(mode) << 62;
    const host_cuda::Operand operand(descriptor, transposed);
    CHECK(operand.start == 4096, "the start");
    return operand.offset(major, k);
  };
  struct {
    int mode;
    uint32_t row;  // bytes of a swizzled row
  } const modes[] = {{1, 128}, {2, 64}, {3, 32}};
  for (const auto& [mode, row] : modes) {
    CHECK(offset(mode, false, 0, 1) == 2 && offset(mode, false, 0, 8) == 16, "K contiguous, along K");
    CHECK(offset(mode, false, 1, 0) == row && offset(mode, false, 7, 0) == 7 * row, "within 8 rows");
    CHECK(offset(mode, false, 8, 0) == 2048 && offset(mode, false, 17, 9) == 2 * 2048 + row + 18, "beyond 8 rows");
    CHECK(offset(mode, true, 1, 0) == 2 && offset(mode, true, row / 2 - 1, 0) == row - 2, "M contiguous, along M");
    CHECK(offset(mode, true, row / 2, 0) == 512 && offset(mode, true, row, 0) == 1024, "beyond a row");
    CHECK(offset(mode, true, 0, 1) == row && offset(mode, true, 0, 8) == 2048, "along K");
  }
  CHECK(offset(0, false, 1, 0) == 16 && offset(0, false, 8, 0) == 2048 && offset(0, false, 0, 8) == 512, "no swizzle");
  CHECK(offset(0, true, 7, 0) == 14 && offset(0, true, 8, 0) == 2048 && offset(0, true, 0, 1) == 16 &&
            offset(0, true, 0, 8) == 512,
        "no swizzle, M contiguous");
  CHECK(host_cuda::swizzled(0x0390, 3) == 0x03e0 && host_cuda::swizzled(0x0390, 1) == 0x0380, "the swizzle");
}

// A [64, 16] times B [16, 64], with B stored by columns or by rows, added to the registers.
template <bool kRowsOfB>
void a_product_lies_in_the_documented_registers() {
  const Matrix<BFloat16> a = numbered(64, 64, 0), b = numbered(64, 64, 8);
  const auto left = cuda::make_tensor_map("test", DType::bf16, a.data(), 64, 64, a.stride(), 64, 64);
  const auto right = cuda::make_tensor_map("test", DType::bf16, b.data(), 64, 64, b.stride(), 64, 64);
  constexpr int kFirst = 16;  // the second step of the sum
  host_cuda::launch({1, 1}, kThreads, sizeof(Shared), [&] {
    Shared& shared = cuda::shared_as<Shared>();
    if (threadIdx.x == 0) {
      cuda::init_barrier(shared.barrier, 1);
      cuda::arrive_expecting(shared.barrier, 2 * 64 * 128);
      cuda::copy_box(shared.tile[0], left, 0, 0, shared.barrier);
      cuda::copy_box(shared.tile[1], right, 0, 0, shared.barrier);
    }
    __syncthreads();
    cuda::wait(shared.barrier, 0);
    float d[32];
    for (float& value : d) value = 0.5f;
    const uint32_t step = kRowsOfB ? kFirst * 128 : kFirst * 2;
    cuda::wgmma_fence();
    cuda::wgmma<BFloat16, 64, kRowsOfB>(
        d, cuda::matrix_descriptor(cuda::shared_address(shared.tile[0]), 0, 1024) + kFirst * 2 / 16,
        cuda::matrix_descriptor(cuda::shared_address(shared.tile[1]), 0, 1024) + step / 16, true);
    cuda::wgmma_commit();
    CHECK(d[0] == 0.5f, "a product comes before it is waited for");
    cuda::wgmma_wait<0>();
    const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int i = 0; i < 32; ++i) {
      const int64_t row = 16 * warp + lane / 4 + 8 * (i / 2 % 2), column = 8 * (i / 4) + 2 * (lane % 4) + i % 2;
      float sum = 0.5f;
      for (int64_t k = kFirst; k < kFirst + 16; ++k) {
        sum += value_at(row, k) * (kRowsOfB ? value_at(k, column) : value_at(column, k));
      }
      CHECK(d[i] == sum, "thread " + std::to_string(threadIdx.x) + ", register " + std::to_string(i));
    }
  });
}

// Two arrivals and 128 bytes complete a phase, in any order; the next one starts from the same counts.
void a_phase_needs_its_arrivals_and_its_bytes() {
  host_cuda::launch({1, 1}, 32, sizeof(Shared), [] {
    if (threadIdx.x != 0) return;
    uint64_t& word = cuda::shared_as<Shared>().barrier.state;
    const auto phase = [&] { return host_cuda::BarrierWord::read(word).phase; };
    host_cuda::init_barrier(word, 2);
    host_cuda::wait(word, 1);  // before the first phase
    for (uint32_t turn = 0; turn < 3; ++turn) {
      host_cuda::arrive(word, 128);
      host_cuda::arrive(word, 0);
      CHECK(phase() == turn % 2, "a phase completes without its bytes");
      host_cuda::complete_bytes(word, 128);
      CHECK(phase() != turn % 2, "a phase does not complete");
      host_cuda::wait(word, turn % 2);
    }
  });
}

template <class F>
bool stops(F&& kernel) {
  const pid_t child = fork();
  if (child == 0) {
    (void)!freopen("/dev/null", "w", stderr);
    host_cuda::launch({1, 1}, 32, sizeof(Shared), [&] {
      if (threadIdx.x == 0) kernel(cuda::shared_as<Shared>());
    });
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT;
}

void misuse_stops_the_program() {
  const uint64_t descriptor = cuda::matrix_descriptor(0, 0, 1024);
  float d[4];
  CHECK(!stops([](Shared& s) { cuda::init_barrier(s.barrier, 1), cuda::arrive(s.barrier); }), "an arrival stops");
  CHECK(stops([](Shared& s) { cuda::arrive(s.unused); }), "a barrier without counts");
  CHECK(stops([](Shared& s) {
          cuda::init_barrier(s.barrier, 1), cuda::arrive_expecting(s.barrier, 8), cuda::arrive(s.barrier);
        }),
        "an arrival too many");
  CHECK(stops([&](Shared&) { cuda::wgmma<BFloat16, 8, false>(d, descriptor, descriptor, false); }), "no fence");
  const auto write = [](Shared& s, bool fenced) {
    cuda::init_barrier(s.barrier, 1), cuda::write_operand(s.tile[0], BFloat16{});
    if (fenced) cuda::fence_operands();
    cuda::arrive(s.barrier);
  };
  CHECK(!stops([&](Shared& s) { write(s, true); }), "an operand that is fenced stops");
  CHECK(stops([&](Shared& s) { write(s, false); }), "no fence of an operand");
  CHECK(stops([&](Shared& s) { cuda::wait(s.barrier, 0); }), "a phase that nobody completes");
  CHECK(stops([&](Shared&) {
          cuda::wgmma_fence(), cuda::wgmma<BFloat16, 8, false>(d, descriptor, descriptor, false), cuda::wgmma_commit();
        }),
        "a product that nobody waits for");
  CHECK(stops([&](Shared& s) {
          cuda::wgmma_fence();
          cuda::wgmma<BFloat16, 8, false>(d, cuda::matrix_descriptor(sizeof(s) - 1024, 0, 1024), descriptor, false);
          cuda::wgmma_commit(), cuda::wgmma_wait<0>();
        }),
        "an operand past the shared memory");
}

void the_driver_s_rules_hold_for_maps() {
  alignas(16) static uint16_t values[64 * 64];
  const auto valid = [](const uint16_t* base, int64_t stride, int32_t rows, int32_t columns) {
    try {
      cuda::make_tensor_map("test", DType::f16, base, 8, 16, stride, rows, columns);
      return true;
    } catch (const std::runtime_error&) {
      return false;
    }
  };
  CHECK(valid(values, 16, 256, 64) && valid(values, 64, 1, 8), "a map is refused");
  CHECK(!valid(values + 4, 16, 8, 64) && !valid(values, 20, 8, 64) && !valid(values, 8, 8, 64), "base and stride");
  CHECK(!valid(values, 16, 257, 64) && !valid(values, 16, 8, 72) && !valid(values, 16, 0, 64), "the box");
}

}  // namespace

int main() {
  // Tests that fork come first: ThreadSanitizer does not check a fork of a process that has fibers.
  misuse_stops_the_program();
  a_box_is_swizzled_and_padded_with_zeros();
  descriptors_address_the_canonical_layouts();
  a_product_lies_in_the_documented_registers<false>();
  a_product_lies_in_the_documented_registers<true>();
  a_phase_needs_its_arrivals_and_its_bytes();
  the_driver_s_rules_hold_for_maps();
  return exit_status();
}
