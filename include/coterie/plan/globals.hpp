// Global tokens, on top of any pattern: they see all others, and all others see them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>

#include "coterie/core/offsets.hpp"
#include "coterie/plan/rewriter.hpp"

namespace coterie {

struct GlobalsConfig {
  Index globals = 0;                    ///< tokens at the beginning of every sequence; at least 0
  bool causal = false;                  ///< whether global tokens see keys up to themselves only
  Self self = Self::visible;            ///< whether a global token sees itself
  std::span<const Index> offsets = {};  ///< sequences + 1 bounds of the sequences; empty: one
};

/// Makes the first `globals` tokens of every sequence of a completed self-attention plan see all tokens of it, and
/// every other entry see them beside what it sees.
///
/// A window counts as before: global tokens inside it are among its keys; so does the self rule of other tokens, which
/// was settled when the plan was built. Causal global tokens are attention sinks. Another token without an entry (label
/// -1) still sees nothing.
/// After any error, also one of memory, the plan is as it was.
/// Requires: a completed plan of as many keys as tokens, positions that are row numbers, one entry for a row, no memory
///   yet (add it afterwards); groups that stay inside a sequence; entries with one interval, or two of which the first
///   reaches back to the first key that is not global; settings as GlobalsConfig says; otherwise ValueError.
/// Allocates: only where the plan and `scratch` have to grow; without one (null) the call's own.
/// Cost: linear in tokens, entries, keys, and groups times globals.
/// Source: Beltagy et al. 2020 (Longformer), Zaheer et al. 2020 (BigBird); causal: Xiao et al. 2024 (attention sinks).
inline void plan_add_globals(const GlobalsConfig& config, AttentionPlan& plan, PlanScratch* scratch = nullptr) {
  const char* const function = "plan_add_globals";
  const Index n = plan.tokens;
  detail::Faults faults(function);
  faults.expect(config.globals >= 0, "globals", "at least 0", config.globals);
  detail::check_self(faults, config.self);
  const bool completed = plan.row_begin.size() == static_cast<std::size_t>(n) + 1;
  faults.expect(completed, "plan", "a completed plan", "one without row_begin");
  faults.expect(plan.key_tokens == n && plan.query_positions.empty() && plan.key_positions.empty(), "plan",
                "self-attention", "keys of their own, or positions");
  faults.expect(plan.combine == Combine::single, "plan", "one entry for a row", "several");
  faults.expect(plan.memory_tokens == 0, "plan", "one without memory (it is added afterwards)", plan.memory_tokens);
  if (!config.offsets.empty()) detail::check_offsets(faults, "offsets", config.offsets, n);
  faults.raise();
  if (config.globals == 0 || n == 0) return;
  const auto groups = static_cast<Index>(plan.groups.size());
  constexpr Index most = (std::numeric_limits<std::int32_t>::max)();
  const Index listed = static_cast<Index>(plan.keys.size()) + n + groups * (std::min)(config.globals, n);
  if (listed > most) detail::fail<ValueError>(function, "globals", detail::join("key lists of at most ", most), listed);

  detail::PlanRewriter rewriter(plan, scratch);
  const Index sequences = detail::sequence_count(config.offsets);
  Index s = -1, globals_here = 0;
  detail::RowRange now;  // rows of sequence s
  // Adds the group of a sequence's global tokens.
  const auto add_globals = [&] {
    if (globals_here == 0) return;
    rewriter.open_group();
    const auto count = static_cast<std::int32_t>(now.count());
    for (std::int32_t i = 0; i < count; ++i) rewriter.add_key(static_cast<std::int32_t>(now.begin) + i);
    for (std::int32_t i = 0; i < static_cast<std::int32_t>(globals_here); ++i)
      rewriter.add_entry_of_all(static_cast<std::int32_t>(now.begin) + i, i, config.causal ? i + 1 : count,
                                config.self);
  };
  const auto next_sequence = [&] {
    now = detail::sequence_rows(config.offsets, n, ++s);
    globals_here = (std::min)(config.globals, now.count());
    add_globals();
  };
  for (const AttentionPlan::Group& group : plan.groups) {
    const Index first_row = group.key_begin < group.key_end ? plan.keys[static_cast<std::size_t>(group.key_begin)]
                            : group.entry_begin < group.entry_end
                                ? plan.entries[static_cast<std::size_t>(group.entry_begin)]
                                : -1;
    if (first_row < 0) continue;
    while (first_row >= now.end) next_sequence();
    const auto bound = static_cast<std::int32_t>(now.begin + globals_here);
    const auto globals = static_cast<std::int32_t>(globals_here);
    const auto check_inside = [&](std::int32_t row) {
      if (row < now.begin || row >= now.end)
        detail::fail<ValueError>(function, "offsets", "sequences that no group of the plan reaches over",
                                 detail::join("row ", row, " in the group of row ", first_row));
    };
    rewriter.open_group();
    for (std::int32_t j = 0; j < globals; ++j) rewriter.add_key(static_cast<std::int32_t>(now.begin) + j);
    std::int32_t dropped = 0;  // global keys of the group: its first ones
    for (std::int32_t j = group.key_begin; j < group.key_end; ++j) {
      const std::int32_t row = plan.keys[static_cast<std::size_t>(j)];
      check_inside(row);
      if (row < bound)
        ++dropped;
      else
        rewriter.add_key(row);
    }
    const auto shifted = [&](Interval seen) {
      return Interval{(std::max)(seen.begin, dropped) - dropped + globals,
                      (std::max)(seen.end, dropped) - dropped + globals};
    };
    for (auto e = static_cast<std::size_t>(group.entry_begin); e < static_cast<std::size_t>(group.entry_end); ++e) {
      const std::int32_t row = plan.entries[e];
      check_inside(row);
      if (row < bound) continue;
      Interval first = shifted(plan.visible[e]);
      Interval second = shifted(detail::second_interval(plan, e));
      if (first.size() == 0) std::swap(first, second);
      // Global keys, then what is left: one interval where the two meet.
      if (first.size() == 0)
        first = {0, globals};
      else if (first.begin == globals)
        first.begin = 0;
      else if (second.size() == 0)
        second = first, first = {0, globals};
      else
        detail::fail<ValueError>(function, detail::join("visible[", e, "]").c_str(),
                                 "one interval, or a first one from the first key that is not global on", "another");
      rewriter.add_entry(row, first, second);
    }
  }
  while (s + 1 < sequences) next_sequence();
  rewriter.finish();
}

}  // namespace coterie
