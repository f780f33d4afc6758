// Checks the plan of any index; shared by the planner's test and the fuzzer.
#pragma once

#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "neuroada/planner.h"

namespace neuroada::testing {

// The number of connections, or -1 if a column is out of range or occurs twice in its row.
inline int64_t count_connections(const std::vector<int32_t>& index, int64_t d_out, int64_t k, int64_t d_in) {
  int64_t live = 0;
  for (int64_t j = 0; j < d_out; ++j) {
    std::set<int32_t> row;
    for (int64_t s = 0; s < k; ++s) {
      const int32_t column = index[static_cast<size_t>(j * k + s)];
      if (column == -1) continue;
      if (column < 0 || column >= d_in || !row.insert(column).second) return -1;
      ++live;
    }
  }
  return live;
}

// Checks the plan of an index whose columns are all -1 or in range.
inline void check_plan(const std::vector<int32_t>& index, int64_t d_out, int64_t k, int64_t d_in,
                       const std::string& where) {
  std::vector<int32_t> sorted;
  for (int64_t e = 0; e < d_out * k; ++e) {
    if (index[static_cast<size_t>(e)] >= 0) sorted.push_back(static_cast<int32_t>(e));
  }
  std::stable_sort(sorted.begin(), sorted.end(), [&](int32_t a, int32_t b) { return index[a] < index[b]; });

  std::vector<int32_t> values(static_cast<size_t>(plan_size(d_in, static_cast<int64_t>(sorted.size()))), -7);
  plan_index(index.data(), d_out, k, d_in, values.data());
  const PlanView plan(values.data(), d_in);
  CHECK(plan.live() == static_cast<int64_t>(sorted.size()), where + ": wrong number of connections");
  if (plan.live() != static_cast<int64_t>(sorted.size())) return;
  CHECK(std::equal(sorted.begin(), sorted.end(), plan.entry), where + ": not the stable sort by column");
  for (int64_t c = 0; c <= d_in; ++c) {
    const auto before = std::count_if(sorted.begin(), sorted.end(), [&](int32_t e) { return index[e] < c; });
    CHECK(plan.column_start[c] == before, where + ": column " + std::to_string(c) + " starts elsewhere");
  }

  // A column's work is its entries and one write.
  const auto work_before = [&](int64_t c) { return int64_t{plan.column_start[c]} + c; };
  int64_t largest = 0;
  for (int64_t c = 0; c < d_in; ++c) largest = std::max(largest, work_before(c + 1) - work_before(c));
  CHECK(plan.split[0] == 0 && plan.split[kSplits] == d_in, where + ": the splits leave out columns");
  for (int64_t part = 0; part < kSplits; ++part) {
    const int64_t first = plan.split[part], last = plan.split[part + 1];
    CHECK(0 <= first && first <= last && last <= d_in, where + ": split " + std::to_string(part) + " runs back");
    if (first < 0 || first > last || last > d_in) return;
    CHECK((work_before(last) - work_before(first) - largest) * kSplits <= work_before(d_in),
          where + ": part " + std::to_string(part) + " has more than its share of the work");
  }
}

}  // namespace neuroada::testing
