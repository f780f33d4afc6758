// The index planner: a counting sort of the entries by column, columns that split the work evenly, and
// the order of a neuron's slots.
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
}

namespace {

// Eight neurons whose slots are read together.
class Octet {
 public:
  Octet(int32_t* rows, int64_t neurons, int64_t k) : rows_(rows), neurons_(neurons), k_(k) {
    for (int64_t e = 0; e < neurons * k; ++e) {
      if (rows[e] >= 0) ++left_[bank_of(rows[e])];
    }
  }

  // Fills slot s of each neuron in turn from the slots that it has not used, at most kWindow of them.
  void fill(int64_t s) {
    int reads[kBanks] = {};
    int32_t columns[kBanks];
    for (int64_t j = 0; j < neurons_; ++j) {
      int32_t* row = rows_ + j * k_;
      int64_t best = s, lowest = INT64_MAX;
      for (int64_t q = s; q < std::min(k_, s + kWindow); ++q) {
        const bool shared = row[q] >= 0 && std::find(columns, columns + j, row[q]) != columns + j;
        const int64_t cost = shared ? INT64_MIN : cost_of(row[q], reads);
        if (cost < lowest) {
          lowest = cost;
          best = q;
        }
      }
      std::swap(row[s], row[best]);
      columns[j] = row[s];
      if (row[s] < 0) continue;
      --left_[bank_of(row[s])];
      if (lowest != INT64_MIN) ++reads[bank_of(row[s])];
    }
  }

 private:
  static constexpr int64_t kWindow = 64;  // so that the work is linear in k

  // First a bank that nobody reads, of these the one with the most columns still to come; then a slot
  // without a connection; then the bank that the fewest read.
  int64_t cost_of(int32_t column, const int* reads) const {
    if (column < 0) return 0;
    constexpr int64_t kRead = int64_t{1} << 40;
    return kRead * reads[bank_of(column)] - left_[bank_of(column)];
  }

  int32_t* rows_;
  int64_t neurons_, k_;
  int64_t left_[kBanks] = {};
};

}  // namespace

void order_slots(int32_t* index, int64_t d_out, int64_t k) {
  for (int64_t j = 0; j < d_out; j += kBanks) {
    Octet octet(index + j * k, std::min<int64_t>(kBanks, d_out - j), k);
    for (int64_t s = 0; s < k; ++s) octet.fill(s);
  }
}

}  // namespace neuroada
