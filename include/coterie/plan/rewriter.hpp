// The rewriter of plans: writes a new plan from another one, group by group.
#pragma once

#include <algorithm>
#include <cstdint>

#include "coterie/plan/complete.hpp"
#include "coterie/plan/pattern.hpp"

namespace coterie::detail {

/// Copies a plan. After std::bad_alloc `to` is unchanged.
inline void copy_plan(const AttentionPlan& from, AttentionPlan& to) {
  const auto each_list = [](auto& a, auto& b, auto&& f) {
    f(a.entries, b.entries);
    f(a.keys, b.keys);
    f(a.groups, b.groups);
    f(a.visible, b.visible);
    f(a.visible_too, b.visible_too);
    f(a.query_positions, b.query_positions);
    f(a.key_positions, b.key_positions);
    f(a.row_begin, b.row_begin);
    f(a.row_entries, b.row_entries);
    f(a.parts, b.parts);
    f(a.task_begin, b.task_begin);
  };
  each_list(from, to, [](const auto& a, auto& b) { b.reserve(a.size()); });
  each_list(from, to, [](const auto& a, auto& b) { b.assign(a.begin(), a.end()); });  // there is room for it
  to.tokens = from.tokens;
  to.key_tokens = from.key_tokens;
  to.memory_tokens = from.memory_tokens;
  to.combine = from.combine;
}

/// Writes groups, entries and keys of a new plan, which replaces `plan` at the end. Until then, and after every error,
/// also one of memory, `plan` is as it was. `scratch`: kept by the caller, or null: the rewriter's own.
class PlanRewriter {
 public:
  PlanRewriter(AttentionPlan& plan, PlanScratch* scratch)
      : plan_(plan), scratch_(scratch != nullptr ? *scratch : own_), made_(scratch_.rewritten) {
    made_.tokens = plan.tokens;
    made_.key_tokens = plan.key_tokens;
    made_.memory_tokens = plan.memory_tokens;
    made_.combine = plan.combine;
    made_.query_positions = plan.query_positions;
    made_.key_positions = plan.key_positions;
    made_.groups.clear();
    made_.entries.clear();
    made_.keys.clear();
    made_.visible.clear();
    made_.visible_too.clear();
  }
  PlanRewriter(const PlanRewriter&) = delete;
  PlanRewriter& operator=(const PlanRewriter&) = delete;

  /// Scratch memory, free until finish().
  std::vector<std::int32_t>& numbers() { return scratch_.numbers; }

  /// Sets how the entries of a row become one.
  void set_combine(Combine combine) { made_.combine = combine; }
  /// Adds rows of a second key/value source to those that keys may be.
  void add_memory(Index rows) {
    made_.memory_tokens += rows;
    if (!made_.key_positions.empty())
      made_.key_positions.resize(static_cast<std::size_t>(made_.key_tokens + made_.memory_tokens), 0);
  }
  void open_group() {
    const auto entry = static_cast<std::int32_t>(made_.entries.size());
    const auto key = static_cast<std::int32_t>(made_.keys.size());
    made_.groups.push_back({entry, entry, key, key});
  }
  void add_entry(std::int32_t row, Interval first, Interval second) {
    made_.entries.push_back(row);
    made_.visible.push_back(first);
    made_.visible_too.push_back(second.size() > 0 ? second : Interval{first.end, first.end});
    made_.groups.back().entry_end = static_cast<std::int32_t>(made_.entries.size());
  }
  void add_key(std::int32_t row) {
    made_.keys.push_back(row);
    made_.groups.back().key_end = static_cast<std::int32_t>(made_.keys.size());
  }
  /// Adds an entry that sees keys [0, until) of the group; `rule` decides about its own one, at rank `self`.
  void add_entry_of_all(std::int32_t row, std::int32_t self, std::int32_t until, Self rule) {
    const bool has_self = self >= 0 && self < until, alone = has_self && until == 1;
    if (!has_self || rule == Self::visible || (rule == Self::only_if_alone && alone))
      add_entry(row, {0, until}, {});
    else
      add_entry(row, {0, self}, {self + 1, until});
  }

  /// Completes the new plan, and replaces the old one by it.
  void finish() {
    const auto sees = [](Interval seen) { return seen.size() > 0; };
    if (std::none_of(made_.visible_too.begin(), made_.visible_too.end(), sees)) made_.visible_too.clear();
    complete(made_, &scratch_);
    copy_plan(made_, plan_);
  }

 private:
  AttentionPlan& plan_;
  PlanScratch own_, &scratch_;
  AttentionPlan& made_;  // in scratch memory
};

}  // namespace coterie::detail
