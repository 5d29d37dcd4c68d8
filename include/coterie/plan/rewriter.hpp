// A plan written anew, group by group, from another one: what plans on top of plans are made with.
#pragma once

#include <algorithm>
#include <cstdint>

#include "coterie/plan/builder.hpp"

namespace coterie::detail {

/// Writes groups, entries and keys into `made` (memory, kept by the caller), then gives them to `plan`.
class PlanRewriter {
 public:
  PlanRewriter(AttentionPlan& plan, AttentionPlan& made) : plan_(plan), made_(made) {
    made_.groups.clear();
    made_.entries.clear();
    made_.keys.clear();
    made_.visible.clear();
    made_.visible_too.clear();
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
  /// The query sees keys [0, until) of the group, but for its own one at rank `self` by that rule.
  void add_entry_of_all(std::int32_t row, std::int32_t self, std::int32_t until, Self rule) {
    const bool has_self = self >= 0 && self < until, alone = has_self && until == 1;
    if (!has_self || rule == Self::visible || (rule == Self::only_if_alone && alone))
      add_entry(row, {0, until}, {});
    else
      add_entry(row, {0, self}, {self + 1, until});
  }

  /// The plan gets what was written, and the rest is derived from it.
  void finish() {
    const auto sees = [](Interval seen) { return seen.size() > 0; };
    if (std::none_of(made_.visible_too.begin(), made_.visible_too.end(), sees)) made_.visible_too.clear();
    plan_.entries = made_.entries;
    plan_.keys = made_.keys;
    plan_.groups = made_.groups;
    plan_.visible = made_.visible;
    plan_.visible_too = made_.visible_too;
    complete(plan_);
  }

 private:
  AttentionPlan &plan_, &made_;
};

}  // namespace coterie::detail
