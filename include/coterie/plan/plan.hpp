// Who looks at whom: the index arrays of one head's attention.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
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
  std::vector<std::int32_t>
      keys;                   ///< key rows, group by group, ascending inside a group; memory before all tokens or after
  std::vector<Group> groups;  ///< in order, without gaps
  std::vector<Interval> visible;      ///< per entry: ranks of its group's keys that it sees
  std::vector<Interval> visible_too;  ///< empty, or per entry a second interval, not before the end of the first
  std::vector<std::int32_t> query_positions;  ///< empty (row numbers), or per query row its position
  std::vector<std::int32_t> key_positions;    ///< empty (row numbers), or per key row its position

  // What complete() derives.
  std::vector<std::int32_t> row_begin;    ///< tokens + 1: where a row's slice of row_entries begins
  std::vector<std::int32_t> row_entries;  ///< entry numbers, row by row, ascending
  std::vector<Part> parts;                ///< in order of their entries; a group without entries has none
  std::vector<std::int32_t> task_begin;   ///< tasks + 1: a task is parts that have part_entries entries together

  std::vector<std::int32_t> scratch;  ///< of the builders, kept so that the next build allocates nothing; no meaning

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

/// Calls f(part, begins_task) for every part of the plan, in order. Where a group is cut depends on the group alone.
template <class F>
void each_part(const AttentionPlan& plan, F&& f) {
  const auto most = static_cast<std::int32_t>(AttentionPlan::part_entries);
  std::int32_t in_task = most;
  for (std::size_t g = 0; g < plan.groups.size(); ++g) {
    const AttentionPlan::Group& group = plan.groups[g];
    for (std::int32_t begin = group.entry_begin; begin < group.entry_end;) {
      const std::int32_t end = group.entry_end - begin > most ? begin + most : group.entry_end;
      const bool begins_task = in_task >= most;
      f(AttentionPlan::Part{static_cast<std::int32_t>(g), begin, end}, begins_task);
      in_task = (begins_task ? 0 : in_task) + (end - begin);
      begin = end;
    }
  }
}

/// Finds the parts whose keys no other part sees. `listed`: memory, kept by the caller.
inline void find_alone(const AttentionPlan& plan, std::vector<AttentionPlan::Part>& parts,
                       std::vector<std::int32_t>& listed) {
  // Two bits for each key row: listed by a group, and by another one too.
  const auto bit = [](std::int32_t key) { return std::int32_t(std::uint32_t(1) << (std::uint32_t(key) % 32)); };
  const auto word = [](std::int32_t key) { return static_cast<std::size_t>(key) / 32 * 2; };
  // Keys that are listed as the entries are, a row once, are in no two groups.
  bool once = plan.groups.size() <= 1 || (plan.combine == Combine::single && plan.keys == plan.entries);
  if (!once) {
    const std::size_t words = static_cast<std::size_t>(plan.key_tokens + plan.memory_tokens) / 32 * 2 + 2;
    listed.resize(std::max(listed.size(), words));
    std::fill_n(listed.begin(), words, 0);
    std::int32_t again = 0;
    for (const std::int32_t key : plan.keys) {
      std::int32_t* const at = listed.data() + word(key);
      again |= at[0] & bit(key);
      at[1] |= at[0] & bit(key);
      at[0] |= bit(key);
    }
    once = again == 0;
  }
  for (AttentionPlan::Part& part : parts) {
    const AttentionPlan::Group& group = plan.groups[static_cast<std::size_t>(part.group)];
    part.alone = part.entry_begin == group.entry_begin && part.entry_end == group.entry_end;
    if (!once)
      for (std::int32_t i = group.key_begin; part.alone && i < group.key_end; ++i) {
        const std::int32_t key = plan.keys[static_cast<std::size_t>(i)];
        part.alone = (listed[word(key) + 1] & bit(key)) == 0;
      }
  }
}

/// Requires that `count` fits an int32 row number or entry number, otherwise ShapeError.
inline void check_count(const char* function, const char* argument, Index count) {
  constexpr Index most = std::numeric_limits<std::int32_t>::max();
  if (count < 0 || count > most) fail<ShapeError>(function, argument, join("0 to ", most), count);
}

/// The first i in [begin, end) with good(i) 0, not 1; otherwise end. Tests all without a branch, and searches only faults.
template <class Good>
std::int32_t first_fault(std::int32_t begin, std::int32_t end, Good good) {
  int all = 1;
  for (std::int32_t i = begin; i < end; ++i) all &= good(static_cast<std::size_t>(i));
  if (all != 0) return end;
  while (good(static_cast<std::size_t>(begin)) != 0) ++begin;
  return begin;
}

/// Requires `list[begin, end)` strictly ascending in [0, rows), otherwise ValueError.
inline void check_ascending(const char* function, const char* argument, const std::vector<std::int32_t>& list,
                            std::int32_t begin, std::int32_t end, Index rows) {
  if (begin == end) return;
  const auto row = [&list](std::int32_t i) { return list[static_cast<std::size_t>(i)]; };
  std::int32_t i = begin;
  if (row(begin) >= 0 && row(begin) < rows)
    i = first_fault(begin + 1, end, [&list, below = static_cast<std::int32_t>(rows)](std::size_t j) {
      return int{list[j] > list[j - 1]} & int{list[j] < below};
    });
  if (i < end)
    fail<ValueError>(function, join(argument, "[", i, "]").c_str(),
                     i == begin ? join("a row in [0, ", rows, ")")
                                : join("ascending rows in a group, above ", row(i - 1), " and below ", rows),
                     row(i));
}

inline bool is_inside(Interval interval, std::int32_t first, std::int32_t last) {
  return (interval.begin >= first) & (interval.end >= interval.begin) & (interval.end <= last);
}

[[noreturn]] inline void fail_interval(const char* function, const char* argument, std::size_t entry, Interval interval,
                                       std::int32_t first, std::int32_t last) {
  fail<ValueError>(function, join(argument, "[", entry, "]").c_str(),
                   join("begin <= end inside [", first, ", ", last, ")"),
                   join("[", interval.begin, ", ", interval.end, ")"));
}

/// What a builder writes: sizes, groups, lists, intervals. How many entries a row has is not looked at.
inline void check_structure(const char* function, const AttentionPlan& plan) {
  check_count(function, "tokens", plan.tokens);
  check_count(function, "key_tokens", plan.key_tokens);
  check_count(function, "memory_tokens", plan.memory_tokens);
  check_count(function, "key_tokens + memory_tokens", plan.key_tokens + plan.memory_tokens);
  check_count(function, "entries", static_cast<Index>(plan.entries.size()));
  check_count(function, "keys", static_cast<Index>(plan.keys.size()));
  check_count(function, "groups", static_cast<Index>(plan.groups.size()));
  const auto size_of = [&](const char* argument, std::size_t size, Index expected) {
    if (static_cast<Index>(size) != expected) fail<ShapeError>(function, argument, join(expected, " values"), size);
  };
  size_of("visible", plan.visible.size(), static_cast<Index>(plan.entries.size()));
  if (!plan.visible_too.empty())
    size_of("visible_too", plan.visible_too.size(), static_cast<Index>(plan.entries.size()));
  if (!plan.query_positions.empty()) size_of("query_positions", plan.query_positions.size(), plan.tokens);
  if (!plan.key_positions.empty())
    size_of("key_positions", plan.key_positions.size(), plan.key_tokens + plan.memory_tokens);

  // The groups cover both lists before anything reads through them.
  std::int32_t entry = 0, key = 0;
  const auto entries = static_cast<std::int32_t>(plan.entries.size());
  const auto keys = static_cast<std::int32_t>(plan.keys.size());
  for (std::size_t g = 0; g < plan.groups.size(); ++g) {
    const AttentionPlan::Group& group = plan.groups[g];
    if (group.entry_begin != entry || group.entry_end < entry || group.entry_end > entries)
      fail<ValueError>(function, join("groups[", g, "]").c_str(),
                       join("entries from ", entry, " on, no further than ", entries),
                       join("[", group.entry_begin, ", ", group.entry_end, ")"));
    if (group.key_begin != key || group.key_end < key || group.key_end > keys)
      fail<ValueError>(function, join("groups[", g, "]").c_str(),
                       join("keys from ", key, " on, no further than ", keys),
                       join("[", group.key_begin, ", ", group.key_end, ")"));
    entry = group.entry_end;
    key = group.key_end;
  }
  if (entry != entries || key != keys)
    fail<ValueError>(function, "groups", join("all ", entries, " entries and ", keys, " keys"),
                     join(entry, " entries and ", key, " keys"));

  for (const AttentionPlan::Group& group : plan.groups) {
    check_ascending(function, "entries", plan.entries, group.entry_begin, group.entry_end, plan.tokens);
    std::int32_t tokens = group.key_begin;  // where memory ends
    while (tokens < group.key_end && plan.keys[static_cast<std::size_t>(tokens)] >= plan.key_tokens) ++tokens;
    check_ascending(function, "keys", plan.keys, group.key_begin, tokens, plan.key_tokens + plan.memory_tokens);
    const bool memory_first = tokens > group.key_begin;
    check_ascending(function, "keys", plan.keys, tokens, group.key_end,
                    plan.key_tokens + (memory_first ? 0 : plan.memory_tokens));
    const std::int32_t length = group.key_end - group.key_begin;
    const bool two = !plan.visible_too.empty();
    const std::int32_t fault = first_fault(group.entry_begin, group.entry_end, [&](std::size_t e) {
      return int{is_inside(plan.visible[e], 0, length)} &
             int{!two || is_inside(plan.visible_too[e], plan.visible[e].end, length)};
    });
    if (fault == group.entry_end) continue;
    const auto e = static_cast<std::size_t>(fault);
    if (!is_inside(plan.visible[e], 0, length)) fail_interval(function, "visible", e, plan.visible[e], 0, length);
    fail_interval(function, "visible_too", e, plan.visible_too[e], plan.visible[e].end, length);
  }
}

/// Derives row_begin, row_entries, parts and task_begin of a plan that is known to be right, but for parts that are alone:
/// those are backward's, and to find them takes time for all key rows. Requires one entry a row for Combine::single
/// (ValueError).
inline void derive(AttentionPlan& plan) {
  // Each row's first entry, and each entry's next one of its row; then row by row along them.
  const bool single = plan.combine == Combine::single;
  plan.row_begin.assign(static_cast<std::size_t>(plan.tokens) + 1, -1);
  if (!single) plan.scratch.resize(std::max(plan.scratch.size(), plan.entries.size()));
  auto second = static_cast<std::uint32_t>(-1);  // the first entry that is not its row's first; -1, the most: none
  for (std::size_t e = plan.entries.size(); e-- > 0;) {
    std::int32_t& first = plan.row_begin[static_cast<std::size_t>(plan.entries[e])];
    second = std::min(second, static_cast<std::uint32_t>(first));
    if (!single) plan.scratch[e] = first;
    first = static_cast<std::int32_t>(e);
  }
  if (single && second < plan.entries.size()) {
    plan.row_begin.clear();
    fail<ValueError>("complete", join("entries of row ", plan.entries[second]).c_str(), "one for Combine::single", 2);
  }
  plan.row_entries.resize(plan.entries.size());
  std::int32_t count = 0;
  for (std::int32_t& begin : plan.row_begin) {
    const std::int32_t first = begin;
    begin = count;
    for (std::int32_t e = first; e >= 0; e = single ? -1 : plan.scratch[static_cast<std::size_t>(e)])
      plan.row_entries[static_cast<std::size_t>(count++)] = e;
  }

  plan.parts.clear();
  plan.task_begin.clear();
  each_part(plan, [&plan](const AttentionPlan::Part& part, bool begins_task) {
    if (begins_task) plan.task_begin.push_back(static_cast<std::int32_t>(plan.parts.size()));
    plan.parts.push_back(part);
  });
  plan.task_begin.push_back(static_cast<std::int32_t>(plan.parts.size()));
}

}  // namespace detail

/// Derives row_begin, row_entries, parts and task_begin from what a builder has written; ends every builder and every
/// plan made by hand.
/// Requires: what validate() requires of the written arrays, otherwise ShapeError or ValueError; the plan then stays
/// without derived arrays.
/// Allocates: only where the plan's vectors have to grow.
/// Cost: linear in tokens, entries, keys and groups.
inline void complete(AttentionPlan& plan) {
  plan.row_begin.clear();
  plan.row_entries.clear();
  plan.parts.clear();
  plan.task_begin.clear();
  detail::check_structure("complete", plan);

  detail::derive(plan);
  detail::find_alone(plan, plan.parts, plan.scratch);
}

/// Throws ShapeError (sizes) or ValueError (values) that names what is wrong with a plan; does nothing for a good one.
/// Requires: array sizes that fit; groups in order, without gaps, covering entries and keys; rows in range and strictly
/// ascending inside a group, but all memory before the tokens if not after them; intervals inside their group's keys, the second not before the end of the first; at most
/// one entry per row for Combine::single; and the derived arrays that complete() makes.
/// Cost: linear in tokens, entries, keys and groups.
inline void validate(const AttentionPlan& plan) {
  detail::check_structure("validate", plan);
  const auto stale = [](const char* argument) {
    detail::fail<ValueError>("validate", argument, "what complete() derives", "something else");
  };
  if (plan.row_begin.size() != static_cast<std::size_t>(plan.tokens) + 1 || plan.row_begin.front() != 0 ||
      plan.row_begin.back() != static_cast<std::int32_t>(plan.entries.size()))
    stale("row_begin");
  if (plan.row_entries.size() != plan.entries.size()) stale("row_entries");
  for (std::size_t i = 0; i + 1 < plan.row_begin.size(); ++i) {
    const std::int32_t begin = plan.row_begin[i], end = plan.row_begin[i + 1];
    if (end < begin || end > static_cast<std::int32_t>(plan.entries.size())) stale("row_begin");
    std::int32_t above = -1;
    for (std::int32_t j = begin; j < end; ++j) {
      const std::int32_t entry = plan.row_entries[static_cast<std::size_t>(j)];
      if (entry <= above || entry >= static_cast<std::int32_t>(plan.entries.size()) ||
          plan.entries[static_cast<std::size_t>(entry)] != static_cast<std::int32_t>(i))
        stale("row_entries");
      above = entry;
    }
    if (plan.combine == Combine::single && end - begin > 1)
      detail::fail<ValueError>("validate", detail::join("entries of row ", i).c_str(), "one for Combine::single",
                               end - begin);
  }

  std::size_t parts = 0, tasks = 0;
  detail::each_part(plan, [&](const AttentionPlan::Part& part, bool begins_task) {
    if (begins_task) {
      if (tasks >= plan.task_begin.size() || plan.task_begin[tasks] != static_cast<std::int32_t>(parts))
        stale("task_begin");
      ++tasks;
    }
    if (parts >= plan.parts.size()) stale("parts");
    const AttentionPlan::Part& got = plan.parts[parts++];
    if (got.group != part.group || got.entry_begin != part.entry_begin || got.entry_end != part.entry_end)
      stale("parts");
  });
  if (plan.parts.size() != parts) stale("parts");
  std::vector<AttentionPlan::Part> again = plan.parts;
  std::vector<std::int32_t> listed;
  detail::find_alone(plan, again, listed);
  for (std::size_t i = 0; i < parts; ++i)
    if (again[i].alone != plan.parts[i].alone) stale("parts");
  if (plan.task_begin.size() != tasks + 1 || plan.task_begin.back() != static_cast<std::int32_t>(parts))
    stale("task_begin");
}

/// Least, mean and most of some counts; all zero where there are none.
struct Spread {
  Index min = 0;
  double mean = 0;
  Index max = 0;
};

/// What statistics() says about a plan.
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

/// Sizes and counts of a completed plan.
/// Requires: complete() has been called on the plan, otherwise ValueError.
/// Cost: linear in tokens, entries and groups; does not allocate.
inline PlanStatistics statistics(const AttentionPlan& plan) {
  if (plan.row_begin.size() != static_cast<std::size_t>(plan.tokens) + 1 ||
      plan.row_entries.size() != plan.entries.size())
    detail::fail<ValueError>("statistics", "plan", "a completed plan", "one without row_begin");
  const auto add = [](Spread& spread, bool first, Index count) {
    spread.min = first ? count : std::min(spread.min, count);
    spread.max = std::max(spread.max, count);
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
    result.most_entries_per_row = std::max(result.most_entries_per_row, entries);
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
