// Keys and values that a decoder keeps, as far as a later token can see them, and plans over them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "coterie/kernel/arguments.hpp"
#include "coterie/layer/initialise.hpp"
#include "coterie/plan/plan.hpp"

namespace coterie {

/// Settings of a Decoder; designated initialisers in this order.
struct DecoderConfig {
  Index sequences = 1;     ///< that are decoded side by side, each at its own position; at least 1
  Index max_rollback = 0;  ///< tokens of a sequence that rollback() may take back at a time
  Index reserve = 0;       ///< memory for so many tokens of every sequence is allocated at once; more comes as needed
};

namespace detail {

/// The keys of one cluster of one sequence, by ordinal: the first one is 0, whether it is kept or not. Memory comes in pages of a
/// few rows of the cache, when it is first needed.
struct CacheList {
  Index end = 0;      ///< keys so far
  Index globals = 0;  ///< those of them that are global tokens: the first ones
  std::vector<std::int32_t> pages;
};

/// The lists of heads that share a plan: all local heads, all dense ones, or the query heads of a routed key/value head.
///
/// Cache rows are numbered from 0 on and the units of a group use their own columns of them, each in its own order.
class HeadCache {
 public:
  /// Rows of a page.
  static constexpr Index page_rows = 16;

  Index first_col = 0, cols = 0;        ///< of the cache's rows
  std::vector<CacheList> lists;         ///< per sequence: one for each cluster
  std::vector<CacheList> beginning;     ///< per sequence: its first keys, which stay
  std::vector<std::int32_t> places;     ///< per cache row: the place of its key in the sequence
  std::vector<std::int32_t> distances;  ///< StepPositions::listed: of the current step's keys, in the order of the plan

  /// The row of a key. Capacity: keys that a list keeps, the last ones; 0: all.
  static Index row(const CacheList& list, Index ordinal, Index capacity) {
    const Index slot = capacity > 0 ? ordinal % capacity : ordinal;
    return list.pages[static_cast<std::size_t>(slot / page_rows)] * page_rows + slot % page_rows;
  }

  /// The row for the next key of a list. There are pages() afterwards.
  Index append(CacheList& list, Index capacity) {
    const Index slot = capacity > 0 ? list.end % capacity : list.end;
    if (static_cast<std::size_t>(slot / page_rows) >= list.pages.size()) list.pages.push_back(take_page());
    return row(list, list.end++, capacity);
  }

  /// A page for a list.
  std::int32_t take_page() {
    if (free_.empty()) return pages_++;
    const std::int32_t page = free_.back();
    free_.pop_back();
    return page;
  }

  /// Empties a list and gives its pages back.
  void clear(CacheList& list) {
    free_.insert(free_.end(), list.pages.begin(), list.pages.end());
    list.pages.clear();
    list.end = list.globals = 0;
  }

  /// Pages that lists have had, whether they are free again or not.
  Index pages() const { return pages_; }

  /// Makes room for so many pages of each list, of the beginning and of all together, and so many keys of a step.
  void reserve(Index list_pages, Index beginning_pages, Index all_pages, Index keys) {
    for (CacheList& list : lists) list.pages.reserve(static_cast<std::size_t>(list_pages));
    for (CacheList& list : beginning) list.pages.reserve(static_cast<std::size_t>(beginning_pages));
    free_.reserve(static_cast<std::size_t>(all_pages));
    distances.reserve(static_cast<std::size_t>(keys));
  }

  std::size_t bytes() const {
    std::size_t sum = (free_.capacity() + places.capacity() + distances.capacity()) * sizeof(std::int32_t);
    for (const std::vector<CacheList>* some : {&lists, &beginning})
      for (const CacheList& list : *some) sum += sizeof(CacheList) + list.pages.capacity() * sizeof(std::int32_t);
    return sum;
  }

 private:
  std::int32_t pages_ = 0;
  std::vector<std::int32_t> free_;
};

/// What a step's plan says of positions.
enum class StepPositions {
  none,    ///< nothing
  places,  ///< places in the sequence
  listed,  ///< that the i-th key is i behind the query, whatever its distance: of tables made for the step
};

/// Writes the plan of a step: entries row by row, each a group of its own.
///
/// A row's bits depend on the blocks of its group's key list, which are cut at multiples of key_block. The list of an entry
/// is therefore as long in front of its keys as forward's is, up to whole blocks: of keys that it does not see.
class StepPlan {
 public:
  StepPlan(HeadCache& unit, AttentionPlan& plan, StepPositions positions)
      : unit_(unit), plan_(plan), positions_(positions) {
    for (auto* list : {&plan.entries, &plan.keys, &plan.row_entries, &plan.query_positions}) list->clear();
    plan.row_begin.assign(1, 0);
    plan.task_begin.assign(1, 0);
    plan.groups.clear();
    plan.visible.clear();
    plan.visible_too.clear();
    plan.parts.clear();
    unit.distances.clear();
  }

  /// An entry of the next query row, at `place`. It sees memory (if `with_memory`), `globals` keys, then those of ordinals
  /// [begin, end). In front of these, forward's list has memory, globals, and `begin` keys.
  template <class GlobalRow, class Row>
  void add(Index place, bool with_memory, Index globals, const GlobalRow& global_row, Index begin, Index end,
           const Row& row_of) {
    const Index memory = plan_.memory_tokens;
    const auto key_begin = static_cast<std::int32_t>(plan_.keys.size());
    for (Index i = 0; i < memory; ++i) plan_.keys.push_back(static_cast<std::int32_t>(plan_.key_tokens + i));
    for (Index i = 0; i < globals; ++i) see(place, global_row(i));
    const auto front = static_cast<std::int32_t>(memory + globals);
    Interval first{with_memory ? 0 : static_cast<std::int32_t>(memory), front}, second;
    if (first.size() == 0) first = {0, 0};
    if (begin < end) {
      const Index gap = begin < 2 * key_block ? begin : begin % key_block + key_block;
      plan_.keys.insert(plan_.keys.end(), static_cast<std::size_t>(gap), static_cast<std::int32_t>(row_of(begin)));
      const auto from = front + static_cast<std::int32_t>(gap), until = from + static_cast<std::int32_t>(end - begin);
      for (Index i = begin; i < end; ++i) see(place, row_of(i));
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

  /// Ends the entries of a row, at `place`.
  void end_row(Index place) {
    plan_.row_begin.push_back(static_cast<std::int32_t>(plan_.entries.size()));
    plan_.task_begin.push_back(static_cast<std::int32_t>(plan_.parts.size()));
    if (positions_ == StepPositions::places) plan_.query_positions.push_back(static_cast<std::int32_t>(place));
    if (positions_ == StepPositions::listed) plan_.query_positions.push_back(0);
  }

 private:
  void see(Index place, Index row) {
    const auto at = static_cast<std::size_t>(row);
    plan_.keys.push_back(static_cast<std::int32_t>(row));
    if (positions_ == StepPositions::none) return;
    const std::int32_t own = unit_.places[at];
    if (positions_ == StepPositions::places) {
      plan_.key_positions[at] = own;
      return;
    }
    plan_.key_positions[at] = -static_cast<std::int32_t>(unit_.distances.size());
    unit_.distances.push_back(static_cast<std::int32_t>(place) - own);
  }

  HeadCache& unit_;
  AttentionPlan& plan_;
  StepPositions positions_;
};

/// Keys a list of which the last `window` are seen keeps, so that `rollback` of them may be taken back; 0: all.
constexpr Index cache_capacity(Index window, Index rollback) {
  return window > 0 && window <= std::numeric_limits<Index>::max() - rollback ? window + rollback : 0;
}

constexpr Index pages_for(Index rows) { return (rows + HeadCache::page_rows - 1) / HeadCache::page_rows; }

}  // namespace detail
}  // namespace coterie
