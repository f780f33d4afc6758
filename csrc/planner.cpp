// The index planner: a counting sort of the entries by column, and columns that split the work evenly.
#include "neuroada/planner.h"

#include <vector>

namespace neuroada {

int64_t check_index(const int32_t* index, int64_t d_out, int64_t k, int64_t d_in, std::string& error) {
  int64_t live = 0;
  std::vector<int64_t> last_row(static_cast<size_t>(d_in), -1);
  for (int64_t j = 0; j < d_out; ++j) {
    for (int64_t s = 0; s < k; ++s) {
      const int32_t column = index[j * k + s];
      if (column == -1) continue;
      if (column < -1 || column >= d_in) {
        error = "column " + std::to_string(column) + " in row " + std::to_string(j) +
                " is out of range for a weight with " + std::to_string(d_in) + " inputs";
        return -1;
      }
      if (last_row[static_cast<size_t>(column)] == j) {
        error = "column " + std::to_string(column) + " stands twice in row " + std::to_string(j) +
                ", expected distinct columns";
        return -1;
      }
      last_row[static_cast<size_t>(column)] = j;
      ++live;
    }
  }
  return live;
}

void plan_index(const int32_t* index, int64_t d_out, int64_t k, int64_t d_in, int32_t* plan) {
  int32_t* column_start = plan;
  std::fill(column_start, column_start + d_in + 1, 0);
  for (int64_t e = 0; e < d_out * k; ++e) {
    if (index[e] >= 0) ++column_start[index[e] + 1];
  }
  for (int64_t c = 0; c < d_in; ++c) column_start[c + 1] += column_start[c];

  int32_t* entry = plan + plan_size(d_in, 0);
  std::vector<int32_t> next(column_start, column_start + d_in);
  for (int64_t e = 0; e < d_out * k; ++e) {
    if (index[e] >= 0) entry[next[static_cast<size_t>(index[e])]++] = static_cast<int32_t>(e);
  }

  // A column costs its entries and one write, so the work before column c is column_start[c] + c.
  int32_t* split = plan + d_in + 1;
  const int64_t work = column_start[d_in] + d_in;
  int64_t c = 0;
  for (int64_t part = 0; part <= kSplits; ++part) {
    while (c < d_in && (column_start[c] + c) * kSplits < work * part) ++c;
    split[part] = static_cast<int32_t>(part == kSplits ? d_in : c);
  }
  std::fill_n(split + kSplits + 1, order_size(d_in), 0);
}

}  // namespace neuroada
