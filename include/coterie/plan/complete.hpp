// Completion of a plan after a builder has written it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "coterie/core/check.hpp"
#include "coterie/core/interval.hpp"
#include "coterie/core/matrix.hpp"
#include "coterie/plan/plan.hpp"

namespace coterie {

/// Memory that builders and complete() work in: the next call that gets it allocates nothing once it has grown.
///
/// Its content has no meaning; any plan may be built with any scratch, but only one at a time.
struct PlanScratch {
  std::vector<std::int32_t> numbers;  ///< labels, sequences and ends of buckets; chains of entries; bits of keys
  std::vector<std::int32_t> sorted;   ///< rows by cluster
  AttentionPlan rewritten;            ///< the new plan, until the old one is replaced by it
};

namespace detail {

/// Empties what complete() derives.
inline void clear_derived(AttentionPlan& plan) {
  plan.row_begin.clear();
  plan.row_entries.clear();
  plan.parts.clear();
  plan.task_begin.clear();
}

/// Calls f(part, begins_task) for every part of the plan, in order. The cuts of a group depend on that group alone.
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

/// Sets `alone` of all parts. `listed`: scratch memory.
inline void find_alone(const AttentionPlan& plan, std::vector<AttentionPlan::Part>& parts,
                       std::vector<std::int32_t>& listed) {
  // Two bits for each key row: listed by a group, and by another one too.
  const auto bit = [](std::int32_t key) { return std::int32_t(std::uint32_t(1) << (std::uint32_t(key) % 32)); };
  const auto word = [](std::int32_t key) { return static_cast<std::size_t>(key) / 32 * 2; };
  // Where keys are listed like entries, and each row has one entry, no key is in two groups.
  bool once = plan.groups.size() <= 1 || (plan.combine == Combine::single && plan.keys == plan.entries);
  if (!once) {
    const std::size_t words = static_cast<std::size_t>(plan.key_tokens + plan.memory_tokens) / 32 * 2 + 2;
    listed.resize((std::max)(listed.size(), words));
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
  constexpr Index most = (std::numeric_limits<std::int32_t>::max)();
  if (count < 0 || count > most) fail<ShapeError>(function, argument, join("0 to ", most), count);
}

/// The first i in [begin, end) for which good(i) is 0, not 1; otherwise end. Tests all without a branch, then searches.
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

/// Checks what a builder writes: sizes, groups, lists, intervals; but not how many entries a row has.
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

/// Derives row_begin, row_entries, parts and task_begin of a plan that is known to be right, without Part::alone: only
/// backward needs that, and finding it costs time for all key rows. Requires one entry a row for Combine::single
/// (ValueError). `next`: scratch memory.
inline void derive(AttentionPlan& plan, std::vector<std::int32_t>& next) {
  // First entries of rows and, for each entry, the next one of its row; then row by row along them.
  const bool single = plan.combine == Combine::single;
  plan.row_begin.assign(static_cast<std::size_t>(plan.tokens) + 1, -1);
  if (!single) next.resize((std::max)(next.size(), plan.entries.size()));
  auto second = static_cast<std::uint32_t>(-1);  // the lowest second entry of a row; -1, the most: none
  for (std::size_t e = plan.entries.size(); e-- > 0;) {
    std::int32_t& first = plan.row_begin[static_cast<std::size_t>(plan.entries[e])];
    second = (std::min)(second, static_cast<std::uint32_t>(first));
    if (!single) next[e] = first;
    first = static_cast<std::int32_t>(e);
  }
  if (single && second < plan.entries.size())
    fail<ValueError>("complete", join("entries of row ", plan.entries[second]).c_str(), "one for Combine::single", 2);
  plan.row_entries.resize(plan.entries.size());
  std::int32_t count = 0;
  for (std::int32_t& begin : plan.row_begin) {
    const std::int32_t first = begin;
    begin = count;
    for (std::int32_t e = first; e >= 0; e = single ? -1 : next[static_cast<std::size_t>(e)])
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
///
/// After any error, also one of memory, the plan has no derived arrays, so that attention refuses it.
/// Requires: what validate() requires of the written arrays, otherwise ShapeError or ValueError.
/// Overwrites the derived arrays.
/// Allocates: only where the plan and `scratch` have to grow; without one (null) the call's own.
/// Cost: linear in tokens, entries, keys and groups.
inline void complete(AttentionPlan& plan, PlanScratch* scratch = nullptr) {
  detail::clear_derived(plan);
  detail::check_structure("complete", plan);
  PlanScratch own;
  std::vector<std::int32_t>& numbers = (scratch != nullptr ? *scratch : own).numbers;
  try {
    detail::derive(plan, numbers);
    detail::find_alone(plan, plan.parts, numbers);
  } catch (...) {
    detail::clear_derived(plan);
    throw;
  }
}

/// Checks a whole plan; does nothing for a good one.
/// Requires: array sizes that fit (ShapeError); groups in order, without gaps, covering entries and keys; rows in range
///   and strictly ascending inside a group, but all memory before the tokens if not after them; intervals inside their
///   group's keys, the second not before the end of the first; at most one entry per row for Combine::single; the
///   derived arrays that complete() makes (ValueError).
/// Allocates: lists of parts and of key rows.
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

}  // namespace coterie
