// The plan of a head: index arrays that say which keys each query sees.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "coterie/core/check.hpp"
#include "coterie/core/interval.hpp"
#include "coterie/core/matrix.hpp"

namespace coterie {

/// How the outputs of a query row with several entries become one.
enum class Combine {
  single,  ///< every row has at most one entry
  mean,    ///< the mean of its entries' outputs (the paper's code); entries that see nothing count as absent
  lse,     ///< one softmax over all keys of all its entries (a key seen twice counts twice)
};

/// A plan for one head: groups of query rows and key rows, and for each query the keys of its group that it may see.
struct AttentionPlan {
  /// Slices of `entries` and `keys`.
  struct Group {
    std::int32_t entry_begin = 0, entry_end = 0, key_begin = 0, key_end = 0;
  };
  /// A piece of a group's entries, [entry_begin, entry_end): the unit of work and of partial sums.
  struct Part {
    std::int32_t group = 0, entry_begin = 0, entry_end = 0;
    bool alone = false;  ///< no other part sees its keys: it is its group's only one, and they are in no other group
  };
  /// Entries of a part at most. Parts begin at multiples of it, counted from their group's first entry.
  static constexpr Index part_entries = 512;

  // What a builder writes.
  Index tokens = 0;         ///< query rows
  Index key_tokens = 0;     ///< key and value rows
  Index memory_tokens = 0;  ///< rows of the second key/value source, addressed as key_tokens + i
  Combine combine = Combine::single;
  std::vector<std::int32_t> entries;  ///< query rows, group by group, ascending inside a group
  /// Key rows, group by group, ascending inside a group; memory stands before all tokens or after them.
  std::vector<std::int32_t> keys;
  std::vector<Group> groups;          ///< in order, without gaps
  std::vector<Interval> visible;      ///< per entry: ranks of its group's keys that it sees
  std::vector<Interval> visible_too;  ///< empty, or per entry a second interval, not before the end of the first
  std::vector<std::int32_t> query_positions;  ///< empty (row numbers), or per query row its position
  std::vector<std::int32_t> key_positions;    ///< empty (row numbers), or per key row its position

  // What complete() derives.
  std::vector<std::int32_t> row_begin;    ///< tokens + 1: where a row's slice of row_entries begins
  std::vector<std::int32_t> row_entries;  ///< entry numbers, row by row, ascending
  std::vector<Part> parts;                ///< in order of their entries; a group without entries has none
  std::vector<std::int32_t> task_begin;   ///< tasks + 1: a task is parts that have part_entries entries together

  Index tasks() const { return task_begin.empty() ? 0 : static_cast<Index>(task_begin.size()) - 1; }
};

namespace detail {

/// An entry's second interval, empty where the plan has none.
inline Interval second_interval(const AttentionPlan& plan, std::size_t entry) {
  return plan.visible_too.empty() ? Interval{} : plan.visible_too[entry];
}

/// The group of an entry.
inline const AttentionPlan::Group& group_of(const AttentionPlan& plan, std::int32_t entry) {
  return *std::upper_bound(plan.groups.begin(), plan.groups.end(), entry,
                           [](std::int32_t e, const AttentionPlan::Group& group) { return e < group.entry_end; });
}

/// Whether an entry sees any key.
inline bool sees_key(const AttentionPlan& plan, Index entry) {
  const auto e = static_cast<std::size_t>(entry);
  return plan.visible[e].size() > 0 || second_interval(plan, e).size() > 0;
}

}  // namespace detail

/// Smallest, mean and largest of some counts; all zero where there are none.
struct Spread {
  Index min = 0;
  double mean = 0;
  Index max = 0;
};

/// Sizes and counts of a plan.
struct PlanStatistics {
  Index groups = 0;
  Index visible_pairs = 0;  ///< (entry, key) pairs: what attention costs; a pair seen through two entries counts twice
  Spread keys_per_query;    ///< over all query rows, those that see nothing included
  Spread entries_per_group;
  Spread keys_per_group;
  Index tokens_seeing_nothing = 0;  ///< query rows with no visible key, for lack of an entry or of keys
  Index tokens_without_entry = 0;   ///< query rows that are in no group
  Index most_entries_per_row = 0;
};

/// Counts what is in a completed plan.
/// Requires: complete() has been called on the plan, otherwise ValueError.
/// Allocates: nothing.
/// Cost: linear in tokens, entries and groups.
inline PlanStatistics statistics(const AttentionPlan& plan) {
  if (plan.row_begin.size() != static_cast<std::size_t>(plan.tokens) + 1 ||
      plan.row_entries.size() != plan.entries.size())
    detail::fail<ValueError>("statistics", "plan", "a completed plan", "one without row_begin");
  const auto add = [](Spread& spread, bool first, Index count) {
    spread.min = first ? count : (std::min)(spread.min, count);
    spread.max = (std::max)(spread.max, count);
    spread.mean += static_cast<double>(count);  // a sum until the end
  };
  PlanStatistics result;
  result.groups = static_cast<Index>(plan.groups.size());
  for (std::size_t i = 0; i + 1 < plan.row_begin.size(); ++i) {
    Index keys = 0;
    for (std::int32_t j = plan.row_begin[i]; j < plan.row_begin[i + 1]; ++j) {
      const auto entry = static_cast<std::size_t>(plan.row_entries[static_cast<std::size_t>(j)]);
      keys += plan.visible[entry].size() + detail::second_interval(plan, entry).size();
    }
    const Index entries = plan.row_begin[i + 1] - plan.row_begin[i];
    add(result.keys_per_query, i == 0, keys);
    result.visible_pairs += keys;
    result.tokens_seeing_nothing += keys == 0;
    result.tokens_without_entry += entries == 0;
    result.most_entries_per_row = (std::max)(result.most_entries_per_row, entries);
  }
  for (std::size_t g = 0; g < plan.groups.size(); ++g) {
    const AttentionPlan::Group& group = plan.groups[g];
    add(result.entries_per_group, g == 0, group.entry_end - group.entry_begin);
    add(result.keys_per_group, g == 0, group.key_end - group.key_begin);
  }
  if (plan.tokens > 0) result.keys_per_query.mean /= static_cast<double>(plan.tokens);
  if (!plan.groups.empty()) {
    result.entries_per_group.mean /= static_cast<double>(plan.groups.size());
    result.keys_per_group.mean /= static_cast<double>(plan.groups.size());
  }
  return result;
}

}  // namespace coterie
