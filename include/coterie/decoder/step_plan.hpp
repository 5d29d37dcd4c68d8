// The plan of one step of a decoder: the newest token of some sequences, over the rows of a cache.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "coterie/kernel/arguments.hpp"
#include "coterie/plan/plan.hpp"

namespace coterie::detail {

/// The positions that the plan of a step holds.
enum class StepPositions {
  none,      ///< nothing
  absolute,  ///< positions in the sequence
  listed,    ///< ordinals: the i-th key counts as i behind the query, for tables made for the step
};

/// Writes the plan of a step: entries row by row, each a group of its own.
///
/// A row's bits depend on the blocks of its group's key list, which are cut at multiples of key_block. So the list of
/// an entry has as many keys in front of those that it sees as forward's list has, up to whole blocks; the entry does
/// not see them.
class StepPlan {
 public:
  /// A plan of `tokens` rows over a cache with these positions of its rows. Its memory_tokens and combine stay.
  StepPlan(AttentionPlan& plan, std::vector<std::int32_t>& distances, StepPositions positions, Index tokens,
           Index cache_rows, std::span<const std::int32_t> cache_positions)
      : plan_(plan), distances_(distances), positions_(positions), cache_positions_(cache_positions) {
    plan.tokens = tokens;
    plan.key_tokens = cache_rows;
    for (auto* list : {&plan.entries, &plan.keys, &plan.row_entries, &plan.query_positions}) list->clear();
    if (positions != StepPositions::none)
      plan.key_positions.resize(static_cast<std::size_t>(cache_rows + plan.memory_tokens));
    plan.row_begin.assign(1, 0);
    plan.task_begin.assign(1, 0);
    plan.groups.clear();
    plan.visible.clear();
    plan.visible_too.clear();
    plan.parts.clear();
    distances.clear();
  }

  /// An entry of the next query row, at `position`. It sees memory (if `with_memory`), `globals` keys, then those of
  /// ordinals [begin, end). In front of these, forward's list has memory, globals, and `begin` keys.
  template <class GlobalRow, class Row>
  void add(Index position, bool with_memory, Index globals, const GlobalRow& global_row, Index begin, Index end,
           const Row& row_of) {
    const Index memory = plan_.memory_tokens;
    const auto key_begin = static_cast<std::int32_t>(plan_.keys.size());
    for (Index i = 0; i < memory; ++i) plan_.keys.push_back(static_cast<std::int32_t>(plan_.key_tokens + i));
    for (Index i = 0; i < globals; ++i) see(position, global_row(i));
    const auto front = static_cast<std::int32_t>(memory + globals);
    Interval first{with_memory ? 0 : static_cast<std::int32_t>(memory), front}, second;
    if (first.size() == 0) first = {0, 0};
    if (begin < end) {
      const Index gap = begin < 2 * key_block ? begin : begin % key_block + key_block;
      plan_.keys.insert(plan_.keys.end(), static_cast<std::size_t>(gap), static_cast<std::int32_t>(row_of(begin)));
      const auto from = front + static_cast<std::int32_t>(gap), until = from + static_cast<std::int32_t>(end - begin);
      for (Index i = begin; i < end; ++i) see(position, row_of(i));
      if (first.size() == 0)
        first = {from, until};
      else if (first.end == from)
        first.end = until;
      else
        second = {from, until};
    }
    const auto entry = static_cast<std::int32_t>(plan_.entries.size());
    plan_.entries.push_back(static_cast<std::int32_t>(plan_.row_begin.size()) - 1);
    plan_.visible.push_back(first);
    plan_.visible_too.push_back(second.size() > 0 ? second : Interval{first.end, first.end});
    plan_.groups.push_back({entry, entry + 1, key_begin, static_cast<std::int32_t>(plan_.keys.size())});
    plan_.parts.push_back({entry, entry, entry + 1, false});
    plan_.row_entries.push_back(entry);
  }

  /// Ends the entries of a row, at `position`.
  void end_row(Index position) {
    plan_.row_begin.push_back(static_cast<std::int32_t>(plan_.entries.size()));
    plan_.task_begin.push_back(static_cast<std::int32_t>(plan_.parts.size()));
    if (positions_ == StepPositions::absolute) plan_.query_positions.push_back(static_cast<std::int32_t>(position));
    if (positions_ == StepPositions::listed) plan_.query_positions.push_back(0);
  }

  /// Reserves memory for a plan of so many entries and keys.
  static void reserve(AttentionPlan& plan, std::vector<std::int32_t>& distances, Index entries, Index keys) {
    const auto number = static_cast<std::size_t>(entries);
    for (auto* list : {&plan.entries, &plan.row_entries, &plan.row_begin, &plan.query_positions, &plan.task_begin})
      list->reserve(number + 1);
    plan.groups.reserve(number);
    plan.visible.reserve(number);
    plan.visible_too.reserve(number);
    plan.parts.reserve(number);
    plan.keys.reserve(static_cast<std::size_t>(keys));
    distances.reserve(static_cast<std::size_t>(keys));
  }

 private:
  void see(Index position, Index row) {
    const auto at = static_cast<std::size_t>(row);
    plan_.keys.push_back(static_cast<std::int32_t>(row));
    if (positions_ == StepPositions::none) return;
    const std::int32_t own = cache_positions_[at];
    if (positions_ == StepPositions::absolute) {
      plan_.key_positions[at] = own;
      return;
    }
    plan_.key_positions[at] = -static_cast<std::int32_t>(distances_.size());
    distances_.push_back(static_cast<std::int32_t>(position) - own);
  }

  AttentionPlan& plan_;
  std::vector<std::int32_t>& distances_;
  StepPositions positions_;
  std::span<const std::int32_t> cache_positions_;
};

}  // namespace coterie::detail
