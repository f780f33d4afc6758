// out[j, s] = sum_t grad[t, j] x[t, index[j, s]], for few bypasses per neuron, in bfloat16 only.
//
// Four tokens of a column are interleaved into a cell of 8 bytes, the only reordering of x and grad: rows are
// read in place, four at a time, and the cells of x stay in L1. A vector gathers the cells of eight
// neurons. Transposing whole blocks, as sddmm.cpp does, costs more than the products of few bypasses per neuron, but
// makes each product cheaper: a sum stays in registers there, and is read and written here for every four tokens.
#include "entry.h"
#include "sddmm_chunks.h"
#include "staging.h"

namespace neuroada::cpu::NEUROADA_ISA {
namespace {

constexpr int64_t kTokens = 4, kCells = 8;  // tokens per cell, cells per vector
constexpr int64_t kLine = 32;               // columns per cache line of a row, cells of four vectors
constexpr int64_t kVectors = kLine / kCells;

// Interleaving works within 16 bytes: cell 8 v + 2 b + i of a line is its column 8 b + 2 v + i.
constexpr int64_t column_of(int64_t cell) { return cell % kCells / 2 * 8 + cell / kCells * 2 + cell % 2; }

// The cell numbers of eight columns, counted from the beginning of a row. -1 counts as the first column, whose sum
// add_chunks() then replaces by zero.
inline __m256i cells_of(__m256i columns) {
  const auto bits = [&](int mask) { return _mm256_and_si256(columns, _mm256_set1_epi32(mask)); };
  columns = _mm256_max_epi32(columns, _mm256_setzero_si256());
  const __m256i vector = _mm256_slli_epi32(bits(6), 2), block = _mm256_srli_epi32(bits(24), 2);
  return _mm256_or_si256(_mm256_or_si256(bits(~31), bits(1)), _mm256_or_si256(vector, block));
}

// The cells of a line; columns from `columns` on and rows from `tokens` on are zero.
struct Line {
  __m512i cells[kVectors];

  Line(const BFloat16* rows, int64_t stride, int64_t tokens, int64_t columns) {
    const __mmask32 there = columns < kLine ? (uint32_t{1} << columns) - 1 : ~uint32_t{0};
    const auto row = [&](int64_t t) {
      return t < tokens ? _mm512_maskz_loadu_epi16(there, rows + t * stride) : _mm512_setzero_si512();
    };
    const __m512i a = row(0), b = row(1), c = row(2), d = row(3);
    const __m512i low_ab = _mm512_unpacklo_epi16(a, b), high_ab = _mm512_unpackhi_epi16(a, b);
    const __m512i low_cd = _mm512_unpacklo_epi16(c, d), high_cd = _mm512_unpackhi_epi16(c, d);
    cells[0] = _mm512_unpacklo_epi32(low_ab, low_cd);
    cells[1] = _mm512_unpackhi_epi32(low_ab, low_cd);
    cells[2] = _mm512_unpacklo_epi32(high_ab, high_cd);
    cells[3] = _mm512_unpackhi_epi32(high_ab, high_cd);
  }
};

int64_t lines_of(int64_t columns) { return ceil_div(columns, kLine); }

// The position of (line, vector v, slot s) in an array of vectors.
int64_t place(int64_t line, int64_t v, int64_t s, int64_t k) { return (line * kVectors + v) * k + s; }

// The entries of index, or of out, in one slot of a vector's eight neurons, masked to neurons that exist.
struct Entries {
  int64_t first;
  __m256i offsets;
  __mmask8 there;

  Entries(const Sddmm& a, int64_t line, int64_t v) : first((line * kLine + column_of(v * kCells)) * a.k) {
    const __m256i neurons = _mm256_setr_epi32(0, 1, 8, 9, 16, 17, 24, 25);  // column_of(), relative to the first
    const int64_t left = a.d_out - line * kLine - column_of(v * kCells);
    there = _mm256_cmplt_epi32_mask(neurons, _mm256_set1_epi32(static_cast<int32_t>(std::min(left, kLine))));
    offsets = _mm256_mullo_epi32(neurons, _mm256_set1_epi32(static_cast<int32_t>(a.k)));
  }

  __m256i columns(const Sddmm& a, int64_t s) const {
    return _mm256_mmask_i32gather_epi32(_mm256_set1_epi32(-1), there, offsets, a.index + first + s, sizeof(*a.index));
  }
  void set(const Sddmm& a, int64_t s, __m256 values) const {
    float* out = static_cast<float*>(a.out) + first + s;
    _mm256_mask_i32scatter_ps(out, there, offsets, values, sizeof(*out));
  }
};

// The cell numbers of the columns of a line's neurons: [vector][slot][neuron of the vector].
void find_cells(const Sddmm& a, int64_t line, int32_t* cells) {
  for (int64_t v = 0; v < kVectors; ++v) {
    const Entries entries(a, line, v);
    for (int64_t s = 0; s < a.k; ++s) {
      int32_t* found = cells + place(0, v, s, a.k) * kCells;
      _mm256_store_si256(reinterpret_cast<__m256i*>(found), cells_of(entries.columns(a, s)));
    }
  }
}

// Adds four tokens to the sums of a line's neurons: two per connection, of two tokens each.
inline void add_line(const Line& grad, const int64_t* x, const int32_t* cells, int64_t k, float* sums) {
#pragma GCC unroll 4
  for (int64_t v = 0; v < kVectors; ++v) {
    for (int64_t s = 0; s < k; ++s) {
      const int64_t at = place(0, v, s, k);
      const __m256i where = _mm256_load_si256(reinterpret_cast<const __m256i*>(cells + at * kCells));
      float* sum = sums + at * kLanes<float>;
      const __m512i gathered = _mm512_i32gather_epi64(where, x, sizeof(*x));
      Vec<float> total = load(sum);
      PairedTokens::add(total, (Vec<float>)gathered, (Vec<float>)grad.cells[v]);
      store(sum, total);
    }
  }
}

// The sums of one chunk for the neurons of the lines [first, last).
void sum_chunk(const Sddmm& a, const TokenChunks& chunks, int64_t chunk, int64_t first, int64_t last, bool prefetches,
               float* partial) {
  const int64_t k = a.k, vectors = place(last - first, 0, 0, k), end = chunks.end(chunk);
  const Scratch<int32_t> cells = make_scratch<int32_t>(vectors * kCells);
  const Scratch<float> sums = make_scratch<float>(vectors * kLanes<float>);
  const Scratch<int64_t> x_cells = make_scratch<int64_t>(lines_of(a.d_in) * kLine);
  const auto at = [&](int64_t line) { return place(line - first, 0, 0, k); };
  for (int64_t line = first; line < last; ++line) find_cells(a, line, cells.get() + at(line) * kCells);
  std::fill(sums.get(), sums.get() + vectors * kLanes<float>, 0.0f);
  for (int64_t t = chunks.begin(chunk); t < end; t += kTokens) {
    // Hardware prefetchers stop at a page boundary, and a row often fills a page.
    const int64_t rows_ahead = prefetches ? std::max<int64_t>(std::min(kTokens, end - t - kTokens), 0) : 0;
    const BFloat16* x = static_cast<const BFloat16*>(a.x) + t * a.x_stride;
    const BFloat16* grad = static_cast<const BFloat16*>(a.grad) + t * a.grad_stride;
    for (int64_t c = 0; c < a.d_in; c += kLine) {
      if (rows_ahead > 0) prefetch_rows<0>(x + kTokens * a.x_stride, a.x_stride, rows_ahead, c);
      const Line line(x + c, a.x_stride, end - t, a.d_in - c);
      std::memcpy(x_cells.get() + c, line.cells, sizeof(line.cells));
    }
    for (int64_t line = first; line < last; ++line) {
      const int64_t j = line * kLine;
      if (rows_ahead > 0) prefetch_rows<0>(grad + kTokens * a.grad_stride, a.grad_stride, rows_ahead, j);
      add_line(Line(grad + j, a.grad_stride, end - t, a.d_out - j), x_cells.get(), cells.get() + at(line) * kCells, k,
               sums.get() + at(line) * kLanes<float>);
    }
  }
  for (int64_t i = 0; i < vectors * kCells; ++i) {
    partial[place(first, 0, 0, k) * kCells + i] = sums.get()[2 * i] + sums.get()[2 * i + 1];
  }
}

// Adds up the sums of a line's neurons over the chunks, which are `stride` apart.
void add_chunks(const Sddmm& a, const TokenChunks& chunks, const float* partial, int64_t stride, int64_t line) {
  for (int64_t v = 0; v < kVectors; ++v) {
    const Entries entries(a, line, v);
    for (int64_t s = 0; s < a.k; ++s) {
      __m256 total = _mm256_setzero_ps();
      for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
        total = _mm256_add_ps(total, _mm256_load_ps(partial + chunk * stride + place(line, v, s, a.k) * kCells));
      }
      const __mmask8 connected = _mm256_cmpge_epi32_mask(entries.columns(a, s), _mm256_setzero_si256());
      entries.set(a, s, _mm256_maskz_mov_ps(connected, total));
    }
  }
}

}  // namespace

void sddmm_few(const Sddmm& a, const Executor& executor, bool prefetches) {
  const TokenChunks chunks(a.tokens, kTokens);
  const int64_t lines = lines_of(a.d_out), stride = place(lines, 0, 0, a.k) * kCells;
  const Scratch<float> partial = make_scratch<float>(chunks.count * stride);
  each_chunk(chunks, lines, executor.limited(work_of(a)), [&](int64_t chunk, int64_t first, int64_t last) {
    sum_chunk(a, chunks, chunk, first, last, prefetches, partial.get() + chunk * stride);
  });
  each_group(lines, chunks.count * stride, executor,
             [&](int64_t line) { add_chunks(a, chunks, partial.get(), stride, line); });
}

}  // namespace neuroada::cpu::NEUROADA_ISA
