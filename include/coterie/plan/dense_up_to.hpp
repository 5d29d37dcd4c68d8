// Dense attention up to a length, on top of any pattern.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>

#include "coterie/plan/rewriter.hpp"

namespace coterie {

struct DenseUpToConfig {
  Index length = 0;     ///< the dense length; at least 0
  bool causal = false;  ///< whether the pattern is causal
  std::optional<Alignment> alignment =
      {};                     ///< alignment of the pattern; default: bottom_right if causal, else proportional
  Self self = Self::visible;  ///< whether the pattern is causal
  std::span<const Index> offsets = {};      ///< sequences + 1 bounds in the query rows; empty: one
  std::span<const Index> key_offsets = {};  ///< the same in the key rows; empty: as offsets
};

/// Makes queries of a completed plan see all there is where that is little.
///
/// Causal: the queries at positions below `length` see every key up to themselves, so a sequence of at most `length`
/// keys is dense. Two-sided: the queries of sequences of at most `length` keys see all of them. Other queries see what
/// they saw. The rule looks at positions and lengths alone, so a causal pattern stays causal: a longer sequence does
/// not change what its first queries see.
/// After any error, also one of memory, the plan is as it was.
/// Requires: a completed plan without memory (add it afterwards), settings as DenseUpToConfig says; otherwise
///   ValueError.
/// Allocates: only where the plan and `scratch` have to grow; without one (null) the call's own.
/// Cost: linear in tokens, entries and keys.
/// Source: as in the Reformer for PyTorch (dense below a threshold), by position: ours.
inline void plan_dense_up_to(const DenseUpToConfig& config, AttentionPlan& plan, PlanScratch* scratch = nullptr) {
  const char* const function = "plan_dense_up_to";
  detail::Faults faults(function);
  faults.expect(config.length >= 0, "length", "at least 0", config.length);
  faults.expect(static_cast<Index>(plan.row_begin.size()) == plan.tokens + 1, "plan", "a completed plan",
                "one without row_begin");
  faults.expect(plan.memory_tokens == 0, "plan", "one without memory (it is added afterwards)", plan.memory_tokens);
  const detail::Pattern pattern = detail::read_pattern(faults, config, plan.tokens, plan.key_tokens);
  faults.raise();
  if (config.length == 0) return;

  // The first queries of a sequence that are dense, and the first keys that they see.
  struct Dense {
    Index queries = 0, keys = 0;
  };
  const auto dense_of = [&](const detail::Sequence& sequence) -> Dense {
    if (!config.causal) return sequence.keys <= config.length ? Dense{sequence.tokens, sequence.keys} : Dense{0, 0};
    Dense dense{0, (std::min)(sequence.keys, config.length)};
    while (dense.queries < sequence.tokens && sequence.position(sequence.query_begin + dense.queries) < config.length)
      ++dense.queries;
    return dense;
  };
  Index listed = static_cast<Index>(plan.keys.size());
  for (Index s = 0; s < pattern.sequences(); ++s) listed += dense_of(pattern.sequence(s)).keys;
  constexpr Index most = (std::numeric_limits<std::int32_t>::max)();
  if (listed > most) detail::fail<ValueError>(function, "length", detail::join("key lists of at most ", most), listed);

  detail::PlanRewriter rewriter(plan, scratch);
  std::vector<std::int32_t>& is_dense = rewriter.numbers();  // by query row
  is_dense.assign(static_cast<std::size_t>(plan.tokens), 0);
  for (Index s = 0; s < pattern.sequences(); ++s) {
    const Index first = pattern.sequence(s).query_begin, count = dense_of(pattern.sequence(s)).queries;
    std::fill_n(is_dense.begin() + first, count, 1);
  }
  // Adds the group of a sequence's dense queries; it stands before the sequence's other groups.
  Index s = 0;
  const auto add_sequence = [&] {
    const detail::Sequence sequence = pattern.sequence(s++);
    const Dense dense = dense_of(sequence);
    if (dense.queries == 0) return;
    rewriter.open_group();
    for (Index j = 0; j < dense.keys; ++j) rewriter.add_key(static_cast<std::int32_t>(sequence.key_begin + j));
    for (Index i = 0; i < dense.queries; ++i) {
      const Index row = sequence.query_begin + i, position = sequence.position(row);
      const Index until = config.causal ? std::clamp<Index>(position + 1, 0, dense.keys) : dense.keys;
      rewriter.add_entry_of_all(static_cast<std::int32_t>(row), static_cast<std::int32_t>(position),
                                static_cast<std::int32_t>(until), config.self);
    }
  };
  const auto begins_by = [&](const AttentionPlan::Group& group, const detail::Sequence& sequence) {
    return (group.key_begin < group.key_end &&
            plan.keys[static_cast<std::size_t>(group.key_begin)] >= sequence.key_begin) ||
           (group.entry_begin < group.entry_end &&
            plan.entries[static_cast<std::size_t>(group.entry_begin)] >= sequence.query_begin);
  };
  for (const AttentionPlan::Group& group : plan.groups) {
    while (s < pattern.sequences() && begins_by(group, pattern.sequence(s))) add_sequence();
    rewriter.open_group();
    for (auto j = static_cast<std::size_t>(group.key_begin); j < static_cast<std::size_t>(group.key_end); ++j)
      rewriter.add_key(plan.keys[j]);
    for (auto e = static_cast<std::size_t>(group.entry_begin); e < static_cast<std::size_t>(group.entry_end); ++e)
      if (is_dense[static_cast<std::size_t>(plan.entries[e])] == 0)
        rewriter.add_entry(plan.entries[e], plan.visible[e], detail::second_interval(plan, e));
  }
  while (s < pattern.sequences()) add_sequence();
  rewriter.finish();
}

}  // namespace coterie
