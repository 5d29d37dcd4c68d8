// Memory: rows of a second key/value source that every entry of a plan sees, on top of any pattern.
#pragma once

#include <algorithm>
#include <numeric>

#include "coterie/plan/plan.hpp"

namespace coterie {

/// Lets every entry of a completed plan see `memory` rows of a second key/value source as well: learned memory keys and
/// values (AttentionTerms::memory_keys and memory_values).
///
/// They stand behind the keys of each group. A row with several entries sees them in each of its softmaxes, once in all for
/// Combine::lse; a row without an entry does not. They have no position: no bias by distance is added to their logits.
/// Requires: a completed plan without memory; memory >= 0; entries whose keys and memory make two intervals at most, so no
///   entry with two intervals of which the last ends before the group's last key; otherwise ValueError, and the plan is as
///   it was.
/// Allocates: only where the plan's vectors have to grow.
/// Cost: linear in entries, keys, and groups times memory.
/// Source: Sukhbaatar et al. 2019 (all-attention), as an option of the PyTorch routing transformer.
inline void plan_add_memory(Index memory, AttentionPlan& plan) {
  const char* const function = "plan_add_memory";
  if (memory < 0) detail::fail<ValueError>(function, "memory", "at least 0", memory);
  if (plan.row_begin.size() != static_cast<std::size_t>(plan.tokens) + 1)
    detail::fail<ValueError>(function, "plan", "a completed plan", "one without row_begin");
  if (plan.memory_tokens != 0) detail::fail<ValueError>(function, "plan", "one without memory", plan.memory_tokens);
  detail::check_count(function, "key_tokens + memory", plan.key_tokens + memory);
  detail::check_count(function, "keys", static_cast<Index>(plan.keys.size() + plan.groups.size()) * (memory + 1));
  if (memory == 0) return;

  const auto added = static_cast<std::int32_t>(memory);
  // The second interval of an entry that sees `last` of `count` keys last, or of none, gets the memory.
  bool two = !plan.visible_too.empty();
  for (const AttentionPlan::Group& group : plan.groups)
    for (auto e = static_cast<std::size_t>(group.entry_begin); e < static_cast<std::size_t>(group.entry_end); ++e) {
      const std::int32_t count = group.key_end - group.key_begin;
      const Interval first = plan.visible[e];
      if (!plan.visible_too.empty() && plan.visible_too[e].size() > 0) {
        if (first.size() > 0 && plan.visible_too[e].end != count)
          detail::fail<ValueError>(function, detail::join("visible_too[", e, "]").c_str(),
                                   detail::join("an end at ", count, ", for memory makes no third interval"),
                                   plan.visible_too[e].end);
      } else {
        two = two || (first.size() > 0 && first.end != count);
      }
    }

  // Lists from the back, for they move apart; an entry's intervals with its group.
  const std::size_t keys = plan.keys.size(), groups = plan.groups.size();
  plan.keys.resize(keys + groups * static_cast<std::size_t>(memory));
  if (two) plan.visible_too.resize(plan.entries.size(), Interval{});
  for (std::size_t g = groups; g-- > 0;) {
    AttentionPlan::Group& group = plan.groups[g];
    const std::int32_t count = group.key_end - group.key_begin;
    const auto begin = plan.keys.begin() + group.key_begin, end = plan.keys.begin() + group.key_end;
    group.key_begin += static_cast<std::int32_t>(g) * added;
    group.key_end = group.key_begin + count + added;
    std::copy_backward(begin, end, plan.keys.begin() + group.key_end - added);
    std::iota(plan.keys.begin() + group.key_end - added, plan.keys.begin() + group.key_end,
              static_cast<std::int32_t>(plan.key_tokens));
    for (auto e = static_cast<std::size_t>(group.entry_begin); e < static_cast<std::size_t>(group.entry_end); ++e) {
      Interval none;
      Interval &first = plan.visible[e], &second = two ? plan.visible_too[e] : none;
      const auto row = static_cast<std::size_t>(plan.entries[e]);
      const bool sees_it =
          plan.combine != Combine::lse ||
          plan.row_entries[static_cast<std::size_t>(plan.row_begin[row])] == static_cast<std::int32_t>(e);
      if (second.size() == 0) second = {first.end, first.end};
      if (!sees_it) continue;
      if (first.size() == 0 && second.size() > 0) std::swap(first, second);
      if (second.size() > 0) {
        second.end += added;
      } else if (first.size() == 0) {
        first = {count, count + added};
        second = {first.end, first.end};
      } else if (first.end == count) {
        first.end += added;
        second = {first.end, first.end};
      } else {
        second = {count, count + added};
      }
    }
  }
  plan.memory_tokens = memory;
  if (!plan.key_positions.empty())
    plan.key_positions.resize(static_cast<std::size_t>(plan.key_tokens + plan.memory_tokens), 0);
  complete(plan);
}

}  // namespace coterie
