// The cache of one block of heads: rows of keys and values that a later token can see, numbered in pages and lists.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "coterie/core/matrix.hpp"

namespace coterie::detail {

/// The shape of a cache.
struct CacheShape {
  Index sequences = 1;
  Index units = 1;      ///< sets of heads that share a plan: each has its own lists, and its own columns of the rows
  Index unit_cols = 0;  ///< columns of a unit, in keys and in values
  Index lists = 1;      ///< lists of a unit and sequence: one for each cluster
  Index capacity = 0;   ///< keys that a list keeps, the last ones; 0: all
  Index beginning = 0;  ///< first keys of a sequence that are kept for good, in a list of their own
  Index globals = 0;    ///< first keys of a sequence that lists count separately
  Index recent = 0;     ///< last keys of a sequence that are kept in a list of their own, whatever their cluster
};

/// The keys of one cluster of one sequence, by ordinal: the first one is 0, whether it is still kept or not.
struct CacheList {
  Index end = 0;                    ///< keys so far
  Index globals = 0;                ///< those of them that are global tokens: the first ones
  std::vector<std::int32_t> pages;  ///< pages of rows, in the order of the ordinals; at least as many as `end` needs
};

/// The key of the token at `position` of a sequence, and the list of a unit that it belongs to.
struct CacheEntry {
  Index unit = 0, sequence = 0, list = 0, position = 0;
};

/// Number of keys that a list has to keep so that the last `window` stay visible after a rollback of `rollback`; 0:
/// all. Sequences end at 2^31 - 1 tokens.
constexpr Index cache_capacity(Index window, Index rollback) {
  constexpr Index most = (std::numeric_limits<std::int32_t>::max)();
  return window > 0 && rollback < most && window <= most - rollback ? window + rollback : 0;
}

/// Keys and values of a block of heads, in rows of one matrix each.
///
/// Rows are numbered from 0 on, and every unit numbers its own columns of them. A list gets its rows in pages, when it
/// first needs them, and keeps the last `capacity` keys as a ring.
///
/// Only make_room, make_room_to_copy and reserve allocate. Where they throw, the keys of all lists are as they were;
/// the other functions do not throw.
template <class T>
class HeadCache {
 public:
  /// Rows of a page.
  static constexpr Index page_rows = 16;
  static constexpr Index pages_for(Index rows) { return rows / page_rows + (rows % page_rows > 0 ? 1 : 0); }

  HeadCache() = default;
  explicit HeadCache(const CacheShape& shape) : shape_(shape) {
    const Index cols = shape.units * shape.unit_cols;
    for (RowMatrix<T>* rows : {&keys_, &values_}) rows->resize(0, cols);
    units_.resize(static_cast<std::size_t>(shape.units));
    for (Unit& unit : units_) {
      unit.lists.resize(static_cast<std::size_t>(shape.sequences * shape.lists));
      if (shape.beginning > 0) unit.beginning.resize(static_cast<std::size_t>(shape.sequences));
      if (shape.recent > 0) unit.recent.resize(static_cast<std::size_t>(shape.sequences));
    }
    if (shape.capacity == 0) return;
    for (RowMatrix<T>* rows : {&lost_keys_, &lost_values_}) rows->resize(shape.sequences, cols);
    for (Unit& unit : units_) unit.lost_positions.resize(static_cast<std::size_t>(shape.sequences));
    const double lists = static_cast<double>(shape.lists) * static_cast<double>(pages_for(shape.capacity));
    const double pages =
        static_cast<double>(shape.sequences) *
        (lists + static_cast<double>(pages_for(shape.beginning)) + static_cast<double>(pages_for(shape.recent)));
    if (pages * page_rows < static_cast<double>(most_rows_)) most_rows_ = static_cast<Index>(pages) * page_rows;
  }

  const CacheShape& shape() const { return shape_; }
  /// Rows that there is memory for.
  Index rows() const { return rows_; }
  /// Keys and values, rows() x units * unit_cols.
  ConstView<T> keys() const { return view(keys_).rows(0, rows_); }
  ConstView<T> values() const { return view(values_).rows(0, rows_); }
  /// Per row of a unit the position of its key.
  std::span<const std::int32_t> positions(Index unit) const { return unit_at(unit).positions; }

  const CacheList& list(Index unit, Index sequence, Index number) const {
    return unit_at(unit).lists[static_cast<std::size_t>(sequence * shape_.lists + number)];
  }
  /// The row of a key of a list, by ordinal.
  Index row(const CacheList& list, Index ordinal) const { return row_in(list, ordinal, shape_.capacity); }
  /// The row of the first keys of a sequence, by position.
  Index beginning_row(Index unit, Index sequence, Index position) const {
    return row_in(unit_at(unit).beginning[static_cast<std::size_t>(sequence)], position, 0);
  }
  /// The row of one of the last keys of a sequence, by position.
  Index recent_row(Index unit, Index sequence, Index position) const {
    return row_in(unit_at(unit).recent[static_cast<std::size_t>(sequence)], position, shape_.recent);
  }

  /// Makes room for one more key.
  void make_room(const CacheEntry& at) {
    Unit& unit = unit_at(at.unit);
    CacheList& list = list_at(at);
    need_pages(unit, list, slot(list.end, shape_.capacity) / page_rows + 1);
    if (shape_.recent > 0) need_pages(unit, recent_at(at), slot(at.position, shape_.recent) / page_rows + 1);
    if (at.position >= shape_.beginning) return;
    CacheList& beginning = unit.beginning[static_cast<std::size_t>(at.sequence)];
    need_pages(unit, beginning, beginning.end / page_rows + 1);
  }

  /// Enters a key, for which make_room has been called. Key and value: rows of all units.
  void append(const CacheEntry& at, const T* key, const T* value) noexcept {
    Unit& unit = unit_at(at.unit);
    CacheList& list = list_at(at);
    if (at.position < shape_.globals) ++list.globals;
    const Index to = row_in(list, list.end, shape_.capacity);
    if (shape_.capacity > 0 && list.end >= shape_.capacity) {
      copy_key(at.unit, keys_, to, lost_keys_, at.sequence);
      copy_key(at.unit, values_, to, lost_values_, at.sequence);
      unit.lost_positions[static_cast<std::size_t>(at.sequence)] = unit.positions[static_cast<std::size_t>(to)];
    }
    write(at, to, key, value);
    ++list.end;
    // The key that is displaced here is older than those that a rollback brings back.
    if (shape_.recent > 0) write(at, row_in(recent_at(at), recent_at(at).end++, shape_.recent), key, value);
    if (at.position >= shape_.beginning) return;
    CacheList& beginning = unit.beginning[static_cast<std::size_t>(at.sequence)];
    write(at, row_in(beginning, beginning.end++, 0), key, value);
  }

  /// Removes the last key of a list. The key that it has displaced stays lost; `capacity` leaves room for that.
  void take_back(const CacheEntry& at) noexcept {
    CacheList& list = list_at(at);
    --list.end;
    if (at.position < shape_.globals) --list.globals;
    if (shape_.recent > 0) --recent_at(at).end;
    if (at.position < shape_.beginning) --unit_at(at.unit).beginning[static_cast<std::size_t>(at.sequence)].end;
  }

  /// Undoes the last append to a unit and sequence, and restores the key that it has displaced.
  void undo_append(const CacheEntry& at) noexcept {
    take_back(at);
    Unit& unit = unit_at(at.unit);
    const CacheList& list = list_at(at);
    if (shape_.capacity == 0 || list.end < shape_.capacity) return;
    const Index to = row_in(list, list.end, shape_.capacity);
    copy_key(at.unit, lost_keys_, at.sequence, keys_, to);
    copy_key(at.unit, lost_values_, at.sequence, values_, to);
    unit.positions[static_cast<std::size_t>(to)] = unit.lost_positions[static_cast<std::size_t>(at.sequence)];
  }

  /// Empties the lists of a sequence; other lists can use their pages.
  void clear(Index sequence) noexcept {
    for (Unit& unit : units_)
      each_list(unit, sequence, [&](CacheList& list) {
        give_back(unit, list, 0);
        list.end = list.globals = 0;
      });
  }

  /// Makes room for copy(from, to); `to` keeps its keys.
  void make_room_to_copy(Index from, Index to) {
    for (Unit& unit : units_)
      each_pair(unit, from, to,
                [&](const CacheList& source, CacheList& target) { need_pages(unit, target, pages_of(source)); });
  }

  /// Makes sequence `to` a copy of `from`, slot by slot. Requires: make_room_to_copy has been called.
  void copy(Index from, Index to) noexcept {
    for (std::size_t u = 0; u < units_.size(); ++u) {
      Unit& unit = units_[u];
      each_pair(unit, from, to, [&](const CacheList& source, CacheList& target) {
        const std::size_t pages = static_cast<std::size_t>(pages_of(source));
        for (std::size_t p = 0; p < pages; ++p) copy_page(static_cast<Index>(u), source.pages[p], target.pages[p]);
        give_back(unit, target, pages);
        target.end = source.end;
        target.globals = source.globals;
      });
    }
  }

  /// Reserves memory for `tokens` tokens of every sequence, of which `rollback` may be removed at a time.
  void reserve(Index tokens, Index rollback) {
    const Index list_pages = pages_for(shape_.capacity > 0 ? (std::min)(tokens, shape_.capacity) : tokens);
    // Lists keep the pages of removed tokens.
    const Index taken_back = shape_.lists * pages_for((std::min)(tokens, rollback));
    const Index lists = (std::min)(shape_.lists * list_pages, shape_.lists + pages_for(tokens) + taken_back);
    const Index beginning = pages_for((std::min)(tokens, shape_.beginning));
    const Index recent = pages_for((std::min)(tokens, shape_.recent));
    const Index all = shape_.sequences * (lists + beginning + recent);
    for (Unit& unit : units_) {
      for (CacheList& list : unit.lists) list.pages.reserve(static_cast<std::size_t>(list_pages));
      for (CacheList& list : unit.beginning) list.pages.reserve(static_cast<std::size_t>(beginning));
      for (CacheList& list : unit.recent) list.pages.reserve(static_cast<std::size_t>(recent));
      unit.free.resize(static_cast<std::size_t>(all));
    }
    need_rows(all * page_rows);
  }

  std::size_t bytes() const {
    const Index numbers = keys_.size() + values_.size() + lost_keys_.size() + lost_values_.size();
    std::size_t sum = static_cast<std::size_t>(numbers) * sizeof(T);
    for (const Unit& unit : units_) {
      sum += (unit.free.capacity() + unit.positions.capacity() + unit.lost_positions.capacity()) * sizeof(std::int32_t);
      for (const std::vector<CacheList>* lists : {&unit.lists, &unit.beginning, &unit.recent})
        for (const CacheList& list : *lists) sum += sizeof(CacheList) + list.pages.capacity() * sizeof(std::int32_t);
    }
    return sum;
  }

 private:
  struct Unit {
    std::vector<CacheList> lists;              // per sequence: one for each cluster
    std::vector<CacheList> beginning, recent;  // per sequence
    std::vector<std::int32_t> positions;       // per row
    std::vector<std::int32_t> lost_positions;  // per sequence: of the key that the last append has displaced
    std::vector<std::int32_t> free;            // the first free_count are free pages; room for all pages
    std::size_t free_count = 0;
    std::int32_t pages = 0;  // pages that lists have had, whether they are free again or not
  };

  Unit& unit_at(Index unit) { return units_[static_cast<std::size_t>(unit)]; }
  const Unit& unit_at(Index unit) const { return units_[static_cast<std::size_t>(unit)]; }
  CacheList& list_at(const CacheEntry& at) {
    return unit_at(at.unit).lists[static_cast<std::size_t>(at.sequence * shape_.lists + at.list)];
  }
  CacheList& recent_at(const CacheEntry& at) { return unit_at(at.unit).recent[static_cast<std::size_t>(at.sequence)]; }

  static Index slot(Index ordinal, Index capacity) { return capacity > 0 ? ordinal % capacity : ordinal; }
  static Index row_in(const CacheList& list, Index ordinal, Index capacity) {
    const Index at = slot(ordinal, capacity);
    return list.pages[static_cast<std::size_t>(at / page_rows)] * page_rows + at % page_rows;
  }
  // Number of pages that hold the keys of a list.
  Index pages_of(const CacheList& list) const {
    return (std::min)(static_cast<Index>(list.pages.size()), pages_for(list.end));
  }

  template <class F>
  void each_list(Unit& unit, Index sequence, const F& f) {
    for (Index l = 0; l < shape_.lists; ++l) f(unit.lists[static_cast<std::size_t>(sequence * shape_.lists + l)]);
    if (shape_.beginning > 0) f(unit.beginning[static_cast<std::size_t>(sequence)]);
    if (shape_.recent > 0) f(unit.recent[static_cast<std::size_t>(sequence)]);
  }
  template <class F>
  void each_pair(Unit& unit, Index from, Index to, const F& f) {
    const Index lists = shape_.lists;
    for (Index l = 0; l < lists; ++l)
      f(std::as_const(unit.lists[static_cast<std::size_t>(from * lists + l)]),
        unit.lists[static_cast<std::size_t>(to * lists + l)]);
    if (shape_.beginning > 0)
      f(std::as_const(unit.beginning[static_cast<std::size_t>(from)]), unit.beginning[static_cast<std::size_t>(to)]);
    if (shape_.recent > 0)
      f(std::as_const(unit.recent[static_cast<std::size_t>(from)]), unit.recent[static_cast<std::size_t>(to)]);
  }

  // Gives a list at least so many pages. A page counts only once there is room for it everywhere.
  void need_pages(Unit& unit, CacheList& list, Index pages) {
    while (static_cast<Index>(list.pages.size()) < pages) {
      if (list.pages.size() == list.pages.capacity()) list.pages.reserve(2 * list.pages.size() + 1);
      if (unit.free_count > 0) {
        list.pages.push_back(unit.free[--unit.free_count]);
        continue;
      }
      const std::size_t all = static_cast<std::size_t>(unit.pages) + 1;
      if (unit.free.size() < all) unit.free.resize(2 * all);
      need_rows(static_cast<Index>(all) * page_rows);
      list.pages.push_back(unit.pages++);
    }
  }

  // Frees the pages of a list behind the first `kept`.
  static void give_back(Unit& unit, CacheList& list, std::size_t kept) noexcept {
    for (; list.pages.size() > kept; list.pages.pop_back()) unit.free[unit.free_count++] = list.pages.back();
  }

  // Grows to at least so many rows, by doubling up to most_rows_; rows keep their numbers. Where an allocation fails,
  // those that have succeeded are merely larger than rows_ says.
  void need_rows(Index rows) {
    if (rows <= rows_) return;
    rows = (std::max)(rows, (std::min)({2 * rows_, rows_ + (Index(1) << 20), most_rows_}));
    for (RowMatrix<T>* matrix : {&keys_, &values_})
      if (matrix->rows() < rows) matrix->conservativeResize(rows, matrix->cols());
    for (Unit& unit : units_) unit.positions.resize(static_cast<std::size_t>(rows));
    rows_ = rows;
  }

  void write(const CacheEntry& at, Index row, const T* key, const T* value) noexcept {
    const Index first = at.unit * shape_.unit_cols;
    std::copy_n(key + first, shape_.unit_cols, view(keys_).row(row) + first);
    std::copy_n(value + first, shape_.unit_cols, view(values_).row(row) + first);
    unit_at(at.unit).positions[static_cast<std::size_t>(row)] = static_cast<std::int32_t>(at.position);
  }

  // Copies the columns of a unit from row to row.
  void copy_key(Index unit, const RowMatrix<T>& from, Index from_row, RowMatrix<T>& to, Index to_row) const noexcept {
    const Index first = unit * shape_.unit_cols;
    std::copy_n(view(from).row(from_row) + first, shape_.unit_cols, view(to).row(to_row) + first);
  }

  void copy_page(Index unit, std::int32_t from, std::int32_t to) noexcept {
    std::vector<std::int32_t>& positions = unit_at(unit).positions;
    for (Index i = 0; i < page_rows; ++i) {
      const Index source = from * page_rows + i, target = to * page_rows + i;
      for (RowMatrix<T>* rows : {&keys_, &values_}) copy_key(unit, *rows, source, *rows, target);
      positions[static_cast<std::size_t>(target)] = positions[static_cast<std::size_t>(source)];
    }
  }

  CacheShape shape_;
  Index rows_ = 0;
  Index most_rows_ = (std::numeric_limits<Index>::max)();  // rows that lists can take
  std::vector<Unit> units_;
  RowMatrix<T> keys_, values_;            // rows x units * unit_cols
  RowMatrix<T> lost_keys_, lost_values_;  // per sequence: what the last append has displaced
};

}  // namespace coterie::detail
