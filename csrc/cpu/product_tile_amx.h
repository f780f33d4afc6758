// A tile of the GEMM in the tile registers of AMX: four hold the sums of 32 rows of W by 32 tokens, and two
// each hold W and x. A tile register has 16 cells of 16 rows of W, row-major, or of 16 tokens of x, as
// staging.h stages them for the gather of the bypass; a cell is a pair of bfloat16.
#pragma once

#include <algorithm>
#include <type_traits>

#include "product_job.h"

namespace neuroada::cpu::NEUROADA_ISA {

inline constexpr int kTileSums = 32;
template <class Cell>
inline constexpr int kTileVectors = 2;
template <int vectors>
inline constexpr int kTileRows = kTileSums;
inline constexpr int64_t kTileCells = 16;

// A panel is as wide as one tile register, so that each tile load reads 1 KB contiguously.
template <int vectors>
inline constexpr int kPanelVectors = 1;

// The AMX GEMM is memory-bound: W is read in place where possible, no copy with its cache misses is interleaved with
// the tile loads, and the rows of a tile stay in cache while they are multiplied by all tokens of a block. Threads
// split the rows of a block rather than take blocks of fewer tokens.
inline constexpr int64_t kLeastTokens = 512;
// More than L2 holds: reading x from L3 costs less than another pass over W.
inline constexpr int64_t kStagedBytes = 8 << 20;
inline constexpr bool kCopiesAside = false, kRowsFirst = true;
// The block of W that the forward pass reads in place. Sums stay in registers for kBlockCells cells, and x of these
// cells stays in L2 for kBlockRows rows.
inline constexpr int64_t kBlockRows = 8 * kTileSums;
template <class Cell>
inline constexpr int64_t kBlockCells = 1024;
// No prefetching in the gather: its gain was not measured.
inline constexpr int64_t kNearBytes = INT64_MAX;
// In elements. Without it, rows of totals a power of two apart, as one tile register holds them, would evict each other
// from the cache.
inline constexpr int64_t kTotalGap = 16;

// Configures all tile registers of this thread as 16 rows of 64 bytes, and releases them when destroyed:
// other code uses other configurations and expects the registers to be free.
class TileRegisters {
 public:
  TileRegisters() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shapes;
    std::fill(shapes.row_bytes, shapes.row_bytes + 8, 64);
    std::fill(shapes.rows, shapes.rows + 8, 16);
    asm volatile("ldtilecfg %0" : : "m"(shapes));
  }
  ~TileRegisters() { asm volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// AddressSanitizer does not check the accesses of these instructions: in its builds both ends of each of the 16 rows
// are read beforehand.
inline void show_to_sanitizer([[maybe_unused]] const void* rows, [[maybe_unused]] int64_t row_bytes) {
#ifdef __SANITIZE_ADDRESS__
  for (int row = 0; row < 16; ++row) {
    const volatile char* bytes = static_cast<const char*>(rows) + row * row_bytes;
    static_cast<void>(bytes[0] + bytes[63]);
  }
#endif
}

// Inline assembly: the intrinsics are macros that need the register's number as a literal.
template <int tile>
inline void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}

// `passes`: a hint that the data need not stay in L1.
template <int tile, bool passes>
inline void load_tile(const void* source, int64_t row_bytes) {
  show_to_sanitizer(source, row_bytes);
  if constexpr (passes) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" : : "r"(source), "r"(row_bytes), "i"(tile));
  } else {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(source), "r"(row_bytes), "i"(tile));
  }
}

template <int tile>
inline void store_tile(void* target, int64_t row_bytes) {
  show_to_sanitizer(target, row_bytes);
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(target), "r"(row_bytes), "i"(tile) : "memory");
}

// sum[row][token] += (sum of the 16 cells' low products) + (sum of their high ones), rounded to float32 after each
// step. As in PairCell, subnormal numbers count as zero.
template <int sum, int rows, int tokens>
inline void add_products() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(rows), "i"(tokens));
}

// Calls f(register number, first row, first token) for each register of sums of a tile.
template <int vectors, class F>
inline void each_sum_tile(F&& f) {
  f(std::integral_constant<int, 0>{}, 0, 0);
  f(std::integral_constant<int, 2>{}, 16, 0);
  if constexpr (vectors == 2) {
    f(std::integral_constant<int, 1>{}, 0, 16);
    f(std::integral_constant<int, 3>{}, 16, 16);
  }
}

// The total accumulates 16 cells at a time: its error is below the output's own rounding to bfloat16. Operands read
// once bypass L1: x and the totals if W is to stay there, otherwise W, which does not fit.
template <int vectors, bool stays>
void multiply_registers(const TileJob<PairCell>& job) {
  constexpr int64_t x_step = 64, float_bytes = sizeof(float);
  // The first store of a tile register after 32 of these steps was measured to take as long as ten steps, after 16
  // as long as one. So there is a dummy store every 8 steps, whose result is not read.
  constexpr int64_t cells_a_store = 8 * kTileCells;
  alignas(64) float unread[16 * 16];
  const int64_t w_step = job.weight.row_step * static_cast<int64_t>(sizeof(BFloat16));
  const int64_t total_step = job.total_stride * float_bytes;
  asm volatile("" : : : "memory");  // compiler barrier: what the tile loads read is written
  each_sum_tile<vectors>([&](auto tile, int64_t row, int64_t token) {
    if (job.overwrite) return clear_tile<tile>();
    load_tile<tile, stays>(job.total + row * job.total_stride + token, total_step);
  });
  for (int64_t c = 0; c < job.cells; c += kTileCells) {
    const float* x = job.panel + c * kLanes<float>;
    const BFloat16* w = job.weight.at + job.row * job.weight.row_step + c * job.weight.cell_step;
    load_tile<4, stays>(x, x_step);
    load_tile<6, !stays>(w, w_step);
    add_products<0, 6, 4>();
    if constexpr (vectors == 2) {
      load_tile<5, stays>(x + job.panel_step, x_step);
      add_products<1, 6, 5>();
    }
    load_tile<7, !stays>(w + 16 * job.weight.row_step, w_step);
    add_products<2, 7, 4>();
    if constexpr (vectors == 2) add_products<3, 7, 5>();
    if (!stays && c % cells_a_store == cells_a_store - kTileCells) store_tile<6>(unread, x_step);
  }
  each_sum_tile<vectors>([&](auto tile, int64_t row, int64_t token) {
    store_tile<tile>(job.total + row * job.total_stride + token, total_step);
  });
}

template <class Cell, int vectors, bool packed, class Aside>
void multiply_tile(const TileJob<Cell>& job, Aside&) {
  static_assert(!packed && std::is_same_v<Aside, NothingAside>, "rows of W with cells side by side, and nothing else");
  if (job.weight.stays) return multiply_registers<vectors, true>(job);
  multiply_registers<vectors, false>(job);
}

}  // namespace neuroada::cpu::NEUROADA_ISA
