// The planner: which indices it rejects with which error text, that a plan is the stable sort of the
// entries by column with splits of equal work, and that ordered slots have few bank conflicts.
#include <algorithm>
#include <limits>
#include <set>

#include "matrix.h"
#include "plan_checks.h"

using namespace neuroada;
using namespace neuroada::testing;

namespace {

using Index = std::vector<int32_t>;

int64_t connections(const Index& index, int64_t d_out, int64_t k, int64_t d_in, std::string* error = nullptr) {
  std::string text;
  const int64_t live = check_index(index.data(), d_out, k, d_in, text);
  CHECK((live < 0) == !text.empty(), "an error text without an error, or the reverse: " + text);
  if (error != nullptr) *error = text;
  return live;
}

void valid_indices_are_counted() {
  CHECK(connections({0, 1, 2, 0}, 2, 2, 3) == 4, "distinct columns");
  CHECK(connections({-1, 1, -1, -1}, 2, 2, 3) == 1, "slots without a connection");
  CHECK(connections({2, -1, -1, 2}, 2, 2, 3) == 2, "one column in two rows");
  CHECK(connections({}, 0, 4, 3) == 0, "no rows");
  CHECK(connections({}, 4, 0, 3) == 0, "no slots");
  CHECK(connections({-1, -1}, 2, 1, 0) == 0, "no inputs");
}

void invalid_indices_are_refused_by_name() {
  std::string error;
  CHECK(connections({0, 3}, 1, 2, 3, &error) == -1, "column d_in");
  CHECK(error == "column 3 in row 0 is out of range for a weight with 3 inputs", error);
  CHECK(connections({0, 1, -2, 1}, 2, 2, 3, &error) == -1, "column -2");
  CHECK(error == "column -2 in row 1 is out of range for a weight with 3 inputs", error);
  CHECK(connections({0, 1, 2, 2}, 2, 2, 3, &error) == -1, "a column twice");
  CHECK(error == "column 2 stands twice in row 1, expected distinct columns", error);
  CHECK(connections({1, -1, 1}, 1, 3, 3) == -1, "a column twice, apart");
  CHECK(connections({0}, 1, 1, 0) == -1, "a column of no inputs");
  for (int32_t column : {std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max()}) {
    CHECK(connections({column}, 1, 1, 3) == -1, "column " + std::to_string(column));
  }
}

void plans_are_stable_sorts_with_even_splits() {
  check_plan({}, 0, 0, 0, "nothing");
  check_plan({-1, -1, -1}, 3, 1, 5, "no connections");
  check_plan({2, 0, 2, 1, 0, 2}, 3, 2, 3, "fewer columns than splits");

  Random random(1);
  for (int64_t d_in : {1, 63, 64, 65, 1000}) {
    Index even, all_on_one, skewed;
    for (int64_t j = 0; j < 500; ++j) {
      even.push_back(static_cast<int32_t>(j % d_in));
      all_on_one.push_back(static_cast<int32_t>(d_in / 2));
      skewed.push_back(static_cast<int32_t>(random.below(1 + random.below(d_in))));
    }
    const std::string where = "d_in " + std::to_string(d_in);
    check_plan(even, 500, 1, d_in, where + ", even");
    check_plan(all_on_one, 500, 1, d_in, where + ", all on one column");
    check_plan(skewed, 500, 1, d_in, where + ", skewed");
  }
}

// The boundaries for any number of parts start at 0, end at d_in and do not decrease.
void boundaries_cover_the_columns() {
  Index index;
  for (int32_t j = 0; j < 300; ++j) index.push_back(j * 7 % 100);
  std::vector<int32_t> values(static_cast<size_t>(plan_size(100, 300)));
  plan_index(index.data(), 300, 1, 100, values.data());
  const PlanView plan(values.data(), 100);
  for (int64_t parts : {1, 2, 3, 7, 63, 64, 65, 200}) {
    CHECK(plan.boundary(0, parts) == 0 && plan.boundary(parts, parts) == 100, std::to_string(parts) + " parts");
    for (int64_t part = 0; part < parts; ++part) {
      CHECK(plan.boundary(part, parts) <= plan.boundary(part + 1, parts), std::to_string(parts) + " parts");
    }
  }
}

// k distinct columns per row, uniform or skewed to popular columns, which a shuffle places anywhere.
Index drawn(int64_t d_out, int64_t k, int64_t d_in, bool skewed, Random& random) {
  std::vector<int32_t> columns(static_cast<size_t>(d_in));
  for (size_t c = 0; c < columns.size(); ++c) columns[c] = static_cast<int32_t>(c);
  for (size_t c = columns.size(); c > 1; --c) std::swap(columns[c - 1], columns[static_cast<size_t>(random.below(c))]);
  Index index;
  for (int64_t j = 0; j < d_out; ++j) {
    const auto first = static_cast<int64_t>(index.size());
    while (static_cast<int64_t>(index.size()) < first + k) {
      // Uniform over all columns, or over the first d_in / 2^n of the shuffled ones, n random.
      const int64_t limit = skewed ? std::max<int64_t>(d_in >> random.below(8), 2 * k) : d_in;
      const int32_t column = columns[static_cast<size_t>(random.below(limit))];
      if (std::find(index.begin() + first, index.end(), column) == index.end()) index.push_back(column);
    }
  }
  return index;
}

// Calls f(first, end) for each octet: its neurons are every second one of [first, end).
template <class F>
void each_octet(int64_t d_out, F&& f) {
  for (int64_t begin = 0; begin < d_out; begin += 16) {
    for (int64_t first : {begin, begin + 1}) f(first, std::min(begin + 16, d_out));
  }
}

// The number of distinct columns of an octet's slots [s, s_end) in the bank that has most of them.
int64_t fullest_bank(const Index& index, int64_t k, int64_t first, int64_t end, int64_t s, int64_t s_end) {
  std::set<int32_t> banks[kBanks];
  for (int64_t j = first; j < end; j += 2) {
    for (int64_t slot = s; slot < s_end; ++slot) {
      const int32_t column = index[static_cast<size_t>(j * k + slot)];
      banks[bank_of(column)].insert(column);
    }
  }
  size_t fullest = 0;
  for (const auto& bank : banks) fullest = std::max(fullest, bank.size());
  return static_cast<int64_t>(fullest);
}

struct Reads {
  double counted, bound;
};

// Average number of shared-memory reads per gather of eight neurons: one per column in the fullest bank of a
// slot. Over all slots there are at least one per slot, and one per column in the fullest bank of all slots.
Reads reads_a_gather(const Index& index, int64_t d_out, int64_t k) {
  int64_t counted = 0, bound = 0, gathers = 0;
  each_octet(d_out, [&](int64_t first, int64_t end) {
    for (int64_t s = 0; s < k; ++s) counted += fullest_bank(index, k, first, end, s, s + 1);
    bound += std::max(k, fullest_bank(index, k, first, end, 0, k));
    gathers += k;
  });
  const auto all = static_cast<double>(gathers);
  return {static_cast<double>(counted) / all, static_cast<double>(bound) / all};
}

// With slots in ascending order of columns, a gather of eight random columns takes 2.6 reads.
void ordered_slots_are_read_hardly_more_often_than_they_must() {
  constexpr int64_t kNeurons = 2048, kInputs = 2048;
  Random random(3);
  for (const int64_t k : {1, 2, 4, 8, 20}) {
    for (const bool skewed : {false, true}) {
      Index index = drawn(kNeurons, k, kInputs, skewed, random);
      for (auto row = index.begin(); row != index.end(); row += k) std::sort(row, row + k);
      Index ordered = index;
      order_slots(ordered.data(), kNeurons, k);
      const double before = reads_a_gather(index, kNeurons, k).counted;
      const auto [after, bound] = reads_a_gather(ordered, kNeurons, k);
      std::printf("k %2d, %s: %.2f reads a gather, %.2f ordered, at least %.2f\n", static_cast<int>(k),
                  skewed ? "skewed " : "uniform", before, after, bound);
      CHECK(after <= 1.07 * bound, "k " + std::to_string(k) + ": " + std::to_string(after));
      for (auto row = ordered.begin(); row != ordered.end(); row += k) std::sort(row, row + k);
      CHECK(ordered == index, "rows are not permuted alone");
    }
  }
}

// Neurons with one column of each bank, with the same columns of one bank, or with four slots without a connection
// and a bank of their own.
void slots_that_can_be_read_once_are() {
  Index by_bank, same, ragged;
  for (int32_t j = 0; j < 16; ++j) {
    for (int32_t s = 0; s < 8; ++s) {
      by_bank.push_back(64 * j + s);
      same.push_back(8 * s + s);  // of one bank
      ragged.push_back((s + j) % 8 < 4 ? -1 : 64 * (8 * j + s) + j / 2);
    }
  }
  for (Index* index : {&by_bank, &same, &ragged}) {
    order_slots(index->data(), 16, 8);
    CHECK(reads_a_gather(*index, 16, 8).counted == 1, "a slot is read more than once");
  }
}

void slots_without_a_connection_and_short_octets_are_permuted_too() {
  Random random(4);
  for (int64_t d_out : {0, 1, 7, 8, 9, 21}) {
    for (int64_t k : {0, 1, 3, 100}) {
      Index index;
      for (int64_t e = 0; e < d_out * k; ++e) {
        index.push_back(random.one_in(3) ? -1 : static_cast<int32_t>(random.below(64)));
      }
      Index ordered = index;
      order_slots(ordered.data(), d_out, k);
      for (Index* each : {&index, &ordered}) {
        for (int64_t j = 0; j < d_out; ++j) std::sort(each->begin() + j * k, each->begin() + (j + 1) * k);
      }
      CHECK(ordered == index, "d_out " + std::to_string(d_out) + ", k " + std::to_string(k));
    }
  }
}

}  // namespace

int main() {
  valid_indices_are_counted();
  invalid_indices_are_refused_by_name();
  plans_are_stable_sorts_with_even_splits();
  boundaries_cover_the_columns();
  ordered_slots_are_read_hardly_more_often_than_they_must();
  slots_that_can_be_read_once_are();
  slots_without_a_connection_and_short_octets_are_permuted_too();
  return exit_status();
}
