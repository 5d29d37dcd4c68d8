// Memory: rows of a second key/value source that every entry of a plan sees, on top of any pattern.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>

#include "coterie/plan/plan.hpp"

namespace coterie {

/// Lets every entry of a completed plan see `memory` rows of a second key/value source as well: learned memory keys and
/// values (AttentionTerms::memory_keys and memory_values).
///
/// They stand before the keys of each group, so that later keys move nothing. A row with several entries sees them in each
/// of its softmaxes, once in all for Combine::lse; a row without an entry does not. They have no position: no bias by
/// distance is added to their logits.
/// Requires: a completed plan without memory; memory >= 0; entries whose keys and memory make two intervals at most, so no
///   entry with two intervals of which the first begins after the group's first key; otherwise ValueError, and the plan is
///   as it was.
/// Allocates: only where the plan's vectors have to grow.
/// Cost: linear in entries, keys, and groups times memory.
/// Source: Sukhbaatar et al. 2019 (all-attention), as an option of the PyTorch routing transformer.
inline void plan_add_memory(Index memory, AttentionPlan& plan) {
  const char* const function = "plan_add_memory";
  constexpr Index most = std::numeric_limits<std::int32_t>::max();
  if (memory < 0 || memory > most) detail::fail<ValueError>(function, "memory", detail::join("0 to ", most), memory);
  if (plan.row_begin.size() != static_cast<std::size_t>(plan.tokens) + 1)
    detail::fail<ValueError>(function, "plan", "a completed plan", "one without row_begin");
  if (plan.memory_tokens != 0) detail::fail<ValueError>(function, "plan", "one without memory", plan.memory_tokens);
  const Index listed = static_cast<Index>(plan.keys.size()) + static_cast<Index>(plan.groups.size()) * memory;
  if (plan.key_tokens + memory > most || listed > most)
    detail::fail<ValueError>(function, "memory", detail::join("key rows and key lists of at most ", most),
                             detail::join(plan.key_tokens + memory, " and ", listed));
  if (memory == 0) return;

  const auto added = static_cast<std::int32_t>(memory);
  const auto sees_it = [&plan](std::size_t e) {
    const auto row = static_cast<std::size_t>(plan.entries[e]);
    return plan.combine != Combine::lse ||
           plan.row_entries[static_cast<std::size_t>(plan.row_begin[row])] == static_cast<std::int32_t>(e);
  };
  bool two = !plan.visible_too.empty();
  for (std::size_t e = 0; e < plan.entries.size(); ++e) {
    const Interval first = plan.visible[e];
    if (first.size() == 0 || first.begin == 0 || !sees_it(e)) continue;
    if (detail::second_interval(plan, e).size() > 0)
      detail::fail<ValueError>(function, detail::join("visible[", e, "]").c_str(),
                               "a begin at 0, for memory makes no third interval", first.begin);
    two = true;
  }

  // Lists from the back, for they move apart.
  const std::size_t keys = plan.keys.size(), groups = plan.groups.size();
  plan.keys.resize(keys + groups * static_cast<std::size_t>(memory));
  if (two) plan.visible_too.resize(plan.entries.size(), Interval{});
  for (std::size_t g = groups; g-- > 0;) {
    AttentionPlan::Group& group = plan.groups[g];
    const auto begin = plan.keys.begin() + group.key_begin, end = plan.keys.begin() + group.key_end;
    group.key_begin += static_cast<std::int32_t>(g) * added;
    group.key_end += static_cast<std::int32_t>(g + 1) * added;
    std::copy_backward(begin, end, plan.keys.begin() + group.key_end);
    std::iota(plan.keys.begin() + group.key_begin, plan.keys.begin() + group.key_begin + added,
              static_cast<std::int32_t>(plan.key_tokens));
  }
  for (std::size_t e = 0; e < plan.entries.size(); ++e) {
    Interval none;
    Interval &first = plan.visible[e], &second = two ? plan.visible_too[e] : none;
    if (first.size() == 0) std::swap(first, second);
    for (Interval* seen : {&first, &second}) *seen = {seen->begin + added, seen->end + added};
    const bool added_to = sees_it(e);
    if (added_to && first.size() == 0)
      first = {0, added};
    else if (added_to && first.begin == added)
      first.begin = 0;
    else if (added_to)
      second = first, first = {0, added};
    if (second.size() == 0) second = {first.end, first.end};
  }
  plan.memory_tokens = memory;
  if (!plan.key_positions.empty())
    plan.key_positions.resize(static_cast<std::size_t>(plan.key_tokens + plan.memory_tokens), 0);
  complete(plan);
}

}  // namespace coterie
