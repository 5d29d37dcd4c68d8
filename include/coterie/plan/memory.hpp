// Memory: rows of a second key/value source that every entry of a plan sees, on top of any pattern.
#pragma once

#include <cstdint>
#include <limits>
#include <utility>

#include "coterie/plan/rewriter.hpp"

namespace coterie {

/// Lets every entry of a completed plan see `memory` rows of a second key/value source as well: learned memory keys and
/// values (AttentionTerms::memory_keys and memory_values).
///
/// They stand before the keys of each group, so that later keys move nothing. A row with several entries sees them in
/// each of its softmaxes, once in all for Combine::lse; a row without an entry does not. They have no position: no bias
/// by distance is added to their logits.
///
/// Memory is visible, but the self rule was settled when the plan was built:
/// under Self::only_if_alone a query that is alone in its cluster sees memory and itself.
/// After any error, also one of memory, the plan is as it was.
/// Requires: a completed plan without memory; memory >= 0; entries whose keys and memory make two intervals at most, so
///   no entry with two intervals of which the first begins after the group's first key; otherwise ValueError.
/// Allocates: only where the plan and `scratch` have to grow; without one (null) the call's own.
/// Cost: linear in entries, keys, and groups times memory.
/// Source: Sukhbaatar et al. 2019 (all-attention), as an option of the PyTorch routing transformer.
inline void plan_add_memory(Index memory, AttentionPlan& plan, PlanScratch* scratch = nullptr) {
  const char* const function = "plan_add_memory";
  constexpr Index most = (std::numeric_limits<std::int32_t>::max)();
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
  detail::PlanRewriter rewriter(plan, scratch);
  rewriter.add_memory(memory);
  for (const AttentionPlan::Group& group : plan.groups) {
    rewriter.open_group();
    for (std::int32_t i = 0; i < added; ++i) rewriter.add_key(static_cast<std::int32_t>(plan.key_tokens) + i);
    for (auto j = static_cast<std::size_t>(group.key_begin); j < static_cast<std::size_t>(group.key_end); ++j)
      rewriter.add_key(plan.keys[j]);
    for (auto e = static_cast<std::size_t>(group.entry_begin); e < static_cast<std::size_t>(group.entry_end); ++e) {
      Interval first = plan.visible[e], second = detail::second_interval(plan, e);
      if (first.size() == 0) std::swap(first, second);
      const bool sees = sees_it(e);
      if (sees && first.begin > 0 && second.size() > 0)
        detail::fail<ValueError>(function, detail::join("visible[", e, "]").c_str(),
                                 "a begin at 0, for memory makes no third interval", first.begin);
      for (Interval* seen : {&first, &second}) *seen = {seen->begin + added, seen->end + added};
      if (sees && first.size() == 0)
        first = {0, added};
      else if (sees && first.begin == added)
        first.begin = 0;
      else if (sees)
        second = first, first = {0, added};
      rewriter.add_entry(plan.entries[e], first, second);
    }
  }
  rewriter.finish();
}

}  // namespace coterie
