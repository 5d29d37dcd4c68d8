// Keys that a query sees by position alone, on top of a causal pattern: the first ones of its sequence, the last ones.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>

#include "coterie/plan/rewriter.hpp"

namespace coterie {

struct SinksRecentConfig {
  Index sinks = 0;   ///< first keys of its sequence that a query sees, those up to itself; at least 0
  Index recent = 0;  ///< last keys up to its position that a query sees, the one at its position included; at least 0
  std::optional<Alignment> alignment = {};  ///< of the pattern; default: bottom_right
  /// Of the pattern. only_if_alone looks at all keys of the one softmax, sinks and recent ones as well.
  Self self = Self::visible;
  std::span<const Index> offsets = {};      ///< of the pattern: sequences + 1 bounds in the query rows; empty: one
  std::span<const Index> key_offsets = {};  ///< the same in the key rows; empty: as offsets
};

namespace detail {

/// Positions of the keys that a query sees by position alone, [0, sinks) and [begin, end), and what is left of those
/// that its pattern shows: those before `until` that are no sinks.
struct KeysByPosition {
  Index sinks = 0, begin = 0, end = 0, until = 0;
};

/// The keys that a query at `position` sees, of a sequence of `keys`. `others`: its pattern shows another key than the
/// one at its position.
inline KeysByPosition keys_by_position(Index sinks, Index recent, Self self, bool others, Index position, Index keys) {
  const Index up_to = std::clamp<Index>(position + 1, 0, keys);
  others = others || (position > 0 && (sinks > 0 || recent > 1));
  const bool hides_self = self == Self::never || (self == Self::only_if_alone && others);
  KeysByPosition seen;
  seen.end = up_to - (hides_self && position >= 0 && position < keys ? 1 : 0);
  seen.sinks = (std::min)(sinks, seen.end);
  seen.until = recent > 0 ? (std::max<Index>)(position + 1 - recent, 0) : seen.end;
  seen.begin = std::clamp(seen.until, seen.sinks, seen.end);
  return seen;
}

}  // namespace detail

/// Lets every query of a completed causal plan see, beside what it sees, the first `sinks` keys of its sequence and the
/// last `recent` keys up to its position, all in one softmax.
///
/// The plan becomes one of Combine::lse. A key that the pattern shows as well counts once: every row gets an entry of
/// sinks and recent keys, before its others, which are cut to the keys between. A window counts as before, with the
/// keys that are cut.
///
/// A row without an entry (label -1) sees sinks and recent keys.
/// After any error, also one of memory, the plan is as it was.
/// Requires: a completed plan without memory (add it afterwards), of Combine::single or lse; groups that stay inside a
///   sequence; entries that see no key after their query; settings as SinksRecentConfig says; otherwise ValueError.
/// Allocates: only where the plan and `scratch` have to grow; without one (null) the call's own.
/// Cost: linear in tokens, entries and keys.
/// Source: sinks and a window as Xiao et al. 2024 (attention sinks), beside clusters: ours.
inline void plan_add_sinks_recent(const SinksRecentConfig& config, AttentionPlan& plan,
                                  PlanScratch* scratch = nullptr) {
  const char* const function = "plan_add_sinks_recent";
  constexpr Index most = (std::numeric_limits<std::int32_t>::max)();
  const auto at = [](const std::vector<std::int32_t>& list, std::int32_t i) {
    return list[static_cast<std::size_t>(i)];
  };
  detail::Faults faults(function);
  faults.expect(config.sinks >= 0, "sinks", "at least 0", config.sinks);
  faults.expect(config.recent >= 0, "recent", "at least 0", config.recent);
  faults.expect(static_cast<Index>(plan.row_begin.size()) == plan.tokens + 1, "plan", "a completed plan",
                "one without row_begin");
  faults.expect(plan.combine != Combine::mean, "plan", "Combine::single or lse (all keys are in one softmax)", "mean");
  faults.expect(plan.memory_tokens == 0, "plan", "one without memory (it is added afterwards)", plan.memory_tokens);
  detail::Pattern pattern;
  pattern.tokens = plan.tokens;
  pattern.keys = plan.key_tokens;
  pattern.alignment = config.alignment.value_or(Alignment::bottom_right);
  pattern.self = config.self;
  pattern.offsets = config.offsets;
  pattern.key_offsets = config.key_offsets;
  detail::check_pattern(faults, pattern);
  faults.raise();
  if (config.sinks == 0 && config.recent == 0) return;
  const Index sinks = (std::min)(config.sinks, most), recent = (std::min)(config.recent, most);
  const Index listed = static_cast<Index>(plan.keys.size()) + plan.key_tokens;
  const Index entries = static_cast<Index>(plan.entries.size()) + plan.tokens;
  if (listed > most || entries > most)
    detail::fail<ValueError>(function, "plan", detail::join("lists of at most ", most),
                             detail::join(entries, " entries and ", listed, " keys"));

  // Calls begin(sequence) for every sequence, and f(group, sequence) for the groups of it after that.
  const auto each_group = [&](auto&& begin, auto&& f) {
    Index s = 0;
    for (const AttentionPlan::Group& group : plan.groups) {
      const bool has_keys = group.key_begin < group.key_end, has_entries = group.entry_begin < group.entry_end;
      if (!has_keys && !has_entries) continue;
      while (s < pattern.sequences()) {
        const detail::Sequence next = pattern.sequence(s);
        if (!(has_keys && at(plan.keys, group.key_begin) >= next.key_begin) &&
            !(has_entries && at(plan.entries, group.entry_begin) >= next.query_begin))
          break;
        begin(next);
        ++s;
      }
      const detail::Sequence now = pattern.sequence((std::max<Index>)(s - 1, 0));
      const auto check_inside = [&](const std::vector<std::int32_t>& list, std::int32_t first, std::int32_t end,
                                    Index from, Index count) {
        if (first < end && (at(list, first) < from || at(list, end - 1) >= from + count))
          detail::fail<ValueError>(function, "offsets", "sequences that no group of the plan reaches over",
                                   detail::join("rows ", at(list, first), " and ", at(list, end - 1), " in a group"));
      };
      check_inside(plan.keys, group.key_begin, group.key_end, now.key_begin, now.keys);
      check_inside(plan.entries, group.entry_begin, group.entry_end, now.query_begin, now.tokens);
      f(group, now);
    }
    while (s < pattern.sequences()) begin(pattern.sequence(s++));
  };

  detail::PlanRewriter rewriter(plan, scratch);
  rewriter.set_combine(Combine::lse);
  // Per query row: whether its pattern shows another key than the one at its position. Only one rule asks.
  const bool alone_matters = config.self == Self::only_if_alone;
  std::vector<std::int32_t>& others = rewriter.numbers();
  others.assign(static_cast<std::size_t>(alone_matters ? plan.tokens : 0), 0);
  if (alone_matters)
    each_group([](const detail::Sequence&) {},
               [&](const AttentionPlan::Group& group, const detail::Sequence& sequence) {
                 for (std::int32_t e = group.entry_begin; e < group.entry_end; ++e) {
                   const auto entry = static_cast<std::size_t>(e);
                   const Interval first = plan.visible[entry], second = detail::second_interval(plan, entry);
                   const std::int32_t count = first.size() + second.size(), row = plan.entries[entry];
                   const std::int32_t last = second.size() > 0 ? second.end : first.end;
                   if (last > group.key_end - group.key_begin)
                     detail::fail<ValueError>(function, detail::join("visible[", e, "]").c_str(), "keys of the group",
                                              "others");
                   const bool other = count > 1 || (count == 1 && at(plan.keys, group.key_begin + last - 1) !=
                                                                      sequence.key_begin + sequence.position(row));
                   others[static_cast<std::size_t>(row)] |= int{other};
                 }
               });
  const auto seen_by = [&](const detail::Sequence& sequence, Index row) {
    return detail::keys_by_position(sinks, recent, config.self,
                                    alone_matters && others[static_cast<std::size_t>(row)] != 0, sequence.position(row),
                                    sequence.keys);
  };
  const auto interval = [](Index begin, Index end) {
    return Interval{static_cast<std::int32_t>(begin), static_cast<std::int32_t>(end)};
  };
  // Adds the group of what the queries of a sequence see by position: its keys, in order.
  const auto begin_sequence = [&](const detail::Sequence& sequence) {
    if (sequence.tokens == 0) return;
    rewriter.open_group();
    const Index keys = recent > 0 ? sequence.keys : (std::min)(sequence.keys, sinks);
    for (Index j = 0; j < keys; ++j) rewriter.add_key(static_cast<std::int32_t>(sequence.key_begin + j));
    for (Index row = sequence.query_begin; row < sequence.query_begin + sequence.tokens; ++row) {
      const detail::KeysByPosition seen = seen_by(sequence, row);
      const auto number = static_cast<std::int32_t>(row);
      if (seen.begin == seen.sinks)
        rewriter.add_entry(number, interval(0, seen.end), {});
      else if (seen.sinks == 0)
        rewriter.add_entry(number, interval(seen.begin, seen.end), {});
      else
        rewriter.add_entry(number, interval(0, seen.sinks), interval(seen.begin, seen.end));
    }
  };
  each_group(begin_sequence, [&](const AttentionPlan::Group& group, const detail::Sequence& sequence) {
    rewriter.open_group();
    const std::int32_t count = group.key_end - group.key_begin;
    for (std::int32_t j = group.key_begin; j < group.key_end; ++j) rewriter.add_key(at(plan.keys, j));
    const auto position_of = [&](std::int32_t rank) {
      return at(plan.keys, group.key_begin + rank) - sequence.key_begin;
    };
    // Ranks where sinks end, recent keys begin, and keys after the query begin. They only grow, for all lists ascend.
    std::int32_t sinks_end = 0, until = 0, up_to = 0;
    while (sinks_end < count && position_of(sinks_end) < sinks) ++sinks_end;
    for (std::int32_t e = group.entry_begin; e < group.entry_end; ++e) {
      const auto entry = static_cast<std::size_t>(e);
      const Index row = plan.entries[entry], position = sequence.position(row);
      const Interval first = plan.visible[entry], second = detail::second_interval(plan, entry);
      while (up_to < count && position_of(up_to) <= position) ++up_to;
      if ((std::max)(first.size() > 0 ? first.end : 0, second.size() > 0 ? second.end : 0) > up_to)
        detail::fail<ValueError>(function, detail::join("visible[", e, "]").c_str(), "keys up to the query",
                                 "later ones");
      const detail::KeysByPosition seen = seen_by(sequence, row);
      if (recent == 0)  // without the query's own key, if it is hidden
        until = up_to - (up_to > 0 && position_of(up_to - 1) >= seen.until ? 1 : 0);
      else
        while (until < count && position_of(until) < seen.until) ++until;
      const auto cut = [&](Interval all) {
        const std::int32_t low = sinks_end, high = (std::max)(sinks_end, until);
        return Interval{std::clamp(all.begin, low, high), std::clamp(all.end, low, high)};
      };
      rewriter.add_entry(static_cast<std::int32_t>(row), cut(first), cut(second));
    }
  });
  rewriter.finish();
}

}  // namespace coterie
