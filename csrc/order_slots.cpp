// Orders the slots of neurons: for each slot, a matching of an octet's neurons with banks.
//
// A slot is read once if its eight neurons have columns in eight banks, which is a perfect matching. By König's
// theorem there are such matchings up to the last slot if every bank has as many columns left as there are slots
// left. So each slot takes most from the banks that have most left, two or more columns from a bank that has more of
// them than there are slots, and spares the banks that have few.
#include <limits>
#include <vector>

#include "neuroada/planner.h"

namespace neuroada {

namespace {

using Lanes = uint32_t;  // a set: a bit for each lane of an octet

int first_of(Lanes lanes) { return __builtin_ctz(lanes); }
int size_of(Lanes lanes) { return __builtin_popcount(lanes); }
bool are_several(Lanes lanes) { return (lanes & (lanes - 1)) != 0; }

// Up to eight neurons whose slots are read together, one per lane.
class Octet {
 public:
  explicit Octet(int64_t k) : k_(k), own_(static_cast<size_t>(kBanks * k)) {}

  // Permutes `lanes` rows of k columns, `stride` apart.
  void order(int32_t* rows, int lanes, int64_t stride) {
    read(rows, lanes, stride);
    for (int64_t s = 0; s < k_; ++s) {
      choose(k_ - s);
      for (int lane = 0; lane < lanes; ++lane) rows[lane * stride + s] = take(lane);
    }
  }

 private:
  static constexpr int32_t kAnyOwn = -1;

  // A distinct column, referred to by its position in columns_.
  struct Column {
    int32_t column;
    Lanes lanes;  // that have yet to read it
  };
  struct Bank {
    int64_t left = 0;             // distinct columns
    Lanes lanes = 0;              // that have columns left
    std::vector<int32_t> shared;  // columns that several lanes have or had
  };
  // A lane's columns of one bank: a stack, where some may have been taken from below the top.
  struct Stack {
    int32_t* top = nullptr;
    int64_t left = 0;
  };
  struct Choice {
    int bank;
    int32_t column;  // or kAnyOwn
  };

  void read(const int32_t* rows, int lanes, int64_t stride);
  void make_stacks(const int32_t* rows, int lanes, int64_t stride);
  void sort_columns(const int32_t* rows, int lanes, int64_t stride);
  void push(int32_t column);

  void choose(int64_t slots_left);
  int64_t priority_of(int bank, int64_t reads) const;
  bool choose_shared(int bank);
  bool choose_own(int bank, Lanes& tried);
  int32_t take(int lane);

  int64_t k_;
  std::vector<uint64_t> keys_;  // (column, lane) of every slot
  std::vector<Column> columns_;
  std::vector<int32_t> own_;  // the stacks, lane by lane
  Stack stacks_[kBanks][kBanks];
  Bank banks_[kBanks];

  // State of the current slot.
  Lanes all_ = 0, free_ = 0, sharing_ = 0;
  Choice choices_[kBanks];  // per lane
};

void Octet::read(const int32_t* rows, int lanes, int64_t stride) {
  all_ = (Lanes{1} << lanes) - 1;
  for (Bank& bank : banks_) {
    bank.left = 0;
    bank.lanes = 0;
    bank.shared.clear();
  }
  make_stacks(rows, lanes, stride);
  sort_columns(rows, lanes, stride);
  // Columns that no other lane has are on top of a stack.
  const auto count = static_cast<int32_t>(columns_.size());
  for (int32_t c = 0; c < count; ++c) {
    if (!are_several(columns_[c].lanes)) continue;
    push(c);
    banks_[bank_of(columns_[c].column)].shared.push_back(c);
  }
  for (int32_t c = 0; c < count; ++c) {
    if (!are_several(columns_[c].lanes)) push(c);
  }
}

// Makes empty stacks, each with room for as many columns as it will have.
void Octet::make_stacks(const int32_t* rows, int lanes, int64_t stride) {
  for (int lane = 0; lane < lanes; ++lane) {
    for (Stack& stack : stacks_[lane]) stack.left = 0;
    for (int64_t s = 0; s < k_; ++s) ++stacks_[lane][bank_of(rows[lane * stride + s])].left;
    int32_t* base = own_.data() + lane * k_;
    for (Stack& stack : stacks_[lane]) {
      stack.top = base;
      base += stack.left;
    }
  }
}

// The distinct columns of all lanes. A slot without a connection reads a column of zeros in the bank of -1. A row
// may have many such slots; the n-th ones of all rows count as one column.
void Octet::sort_columns(const int32_t* rows, int lanes, int64_t stride) {
  keys_.clear();
  for (int lane = 0; lane < lanes; ++lane) {
    uint64_t absent = 0;
    for (int64_t s = 0; s < k_; ++s) {
      const int32_t column = rows[lane * stride + s];
      const uint64_t nth = column == -1 ? absent++ : 0;
      keys_.push_back(nth << 35 | uint64_t{static_cast<uint32_t>(column)} << 3 | static_cast<uint64_t>(lane));
    }
  }
  std::sort(keys_.begin(), keys_.end());
  columns_.clear();
  uint64_t last = 0;
  for (const uint64_t key : keys_) {
    // A column that occurs twice in a row, which check_index() rejects, counts as two.
    if (columns_.empty() || key >> 3 != last >> 3 || key == last) {
      columns_.push_back({static_cast<int32_t>(static_cast<uint32_t>(key >> 3)), 0});
    }
    columns_.back().lanes |= Lanes{1} << (key & 7);
    last = key;
  }
}

void Octet::push(int32_t column) {
  const auto& [value, lanes] = columns_[column];
  const int bank = bank_of(value);
  ++banks_[bank].left;
  banks_[bank].lanes |= lanes;
  for (Lanes rest = lanes; rest != 0; rest &= rest - 1) *stacks_[first_of(rest)][bank].top++ = column;
}

// Chooses what every lane reads in the next of slots_left slots.
void Octet::choose(int64_t slots_left) {
  constexpr int64_t kClosed = std::numeric_limits<int64_t>::min();
  free_ = all_;
  sharing_ = 0;
  int64_t most_left = 0;
  for (const Bank& bank : banks_) most_left = std::max(most_left, bank.left);
  int64_t most_reads = std::max<int64_t>(1, (most_left + slots_left - 1) / slots_left);
  int64_t reads[kBanks] = {}, priority[kBanks];
  for (; free_ != 0; ++most_reads) {
    for (int b = 0; b < kBanks; ++b) priority[b] = priority_of(b, reads[b]);
    while (free_ != 0) {
      const int64_t highest = *std::max_element(priority, priority + kBanks);
      if (highest == kClosed) break;
      const int b = static_cast<int>(highest & (kBanks - 1));
      Lanes tried = 0;
      const bool chosen = choose_shared(b) || choose_own(b, tried);
      priority[b] = chosen && ++reads[b] < most_reads ? priority_of(b, reads[b]) : kClosed;
    }
  }
}

// Highest for the bank with most columns left after this slot's reads; ties go to the one with most shared columns,
// which are to be taken while their lanes are free. The low bits are the bank's number.
int64_t Octet::priority_of(int bank, int64_t reads) const {
  constexpr int64_t kShared = kBanks, kLeft = int64_t{1} << 32;
  const auto shared = static_cast<int64_t>(banks_[bank].shared.size());
  return (banks_[bank].left - reads) * kLeft + shared * kShared + bank;
}

// Assigns the bank's column that most free lanes have to all these lanes, if there are several of them.
bool Octet::choose_shared(int bank) {
  constexpr size_t kWindow = 16;  // so that the work is linear in k
  std::vector<int32_t>& shared = banks_[bank].shared;
  int32_t best = kAnyOwn;
  Lanes lanes = 0;
  for (size_t i = 0; i < std::min(shared.size(), kWindow);) {
    const Lanes left = columns_[shared[i]].lanes;
    if (!are_several(left)) {
      shared[i] = shared.back();
      shared.pop_back();
      continue;
    }
    if (are_several(left & free_) && size_of(left & free_) > size_of(lanes)) {
      best = shared[i];
      lanes = left & free_;
    }
    ++i;
  }
  if (best == kAnyOwn) return false;
  for (Lanes rest = lanes; rest != 0; rest &= rest - 1) choices_[first_of(rest)] = {bank, best};
  free_ &= ~lanes;
  sharing_ |= lanes;
  return true;
}

// Assigns the bank to one more lane: a free one, or one whose bank can be assigned to another (an augmenting path).
bool Octet::choose_own(int bank, Lanes& tried) {
  if (const Lanes free = free_ & banks_[bank].lanes; free != 0) {
    int most = first_of(free);
    for (Lanes rest = free; rest != 0; rest &= rest - 1) {
      if (stacks_[first_of(rest)][bank].left > stacks_[most][bank].left) most = first_of(rest);
    }
    choices_[most] = {bank, kAnyOwn};
    free_ &= ~(Lanes{1} << most);
    return true;
  }
  while (const Lanes rest = banks_[bank].lanes & ~sharing_ & ~tried) {
    const int lane = first_of(rest);
    tried |= Lanes{1} << lane;
    if (choose_own(choices_[lane].bank, tried)) {
      choices_[lane].bank = bank;
      return true;
    }
  }
  return false;
}

// Removes and returns the column chosen for a lane.
int32_t Octet::take(int lane) {
  auto [bank, column] = choices_[lane];
  Stack& stack = stacks_[lane][bank];
  const Lanes bit = Lanes{1} << lane;
  if (column == kAnyOwn) {
    do {
      column = *--stack.top;
    } while ((columns_[column].lanes & bit) == 0);
  }
  columns_[column].lanes &= ~bit;
  if (columns_[column].lanes == 0) --banks_[bank].left;
  if (--stack.left == 0) banks_[bank].lanes &= ~bit;
  return columns_[column].column;
}

}  // namespace

void order_slots(int32_t* index, int64_t d_out, int64_t k) {
  if (k < 2) return;
  Octet octet(k);
  // A lane has two neighbouring neurons and reads their slots one after the other.
  for (int64_t j = 0; j < d_out; j += j % 2 == 0 ? 1 : 2 * kBanks - 1) {
    octet.order(index + j * k, static_cast<int>(std::min<int64_t>(kBanks, (d_out - j + 1) / 2)), 2 * k);
  }
}

}  // namespace neuroada
