// What the lanes of a tile see, and how a block of keys is cut by it.
#pragma once

#include <algorithm>
#include <limits>

#include "coterie/kernel/lanes.hpp"
#include "coterie/kernel/part.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

/// The intervals of a tile's lanes, for tiles of `M::width` lanes.
template <class T, class M>
struct Sight {
  using L = typename M::L;
  using I = typename L::I;
  using Integer = typename L::Integer;
  static constexpr int lanes = L::count, width = M::width, V = width / lanes;
  static constexpr int none = std::numeric_limits<int>::max();

  /// Keys [begin, end) seen by some lane of vectors [first, last); masked: not by every lane.
  struct Segment {
    int begin, end, first, last;
    bool masked;
  };

  alignas(64) Integer from[2][width];  // per interval and lane: keys [from, until)
  alignas(64) Integer until[2][width];
  int all_from[2][V], all_until[2][V];  // keys that every lane of the vector sees
  int intervals, vectors, count;        // intervals in use, vectors in use, lanes with an entry
  Segment segments[4 * V];              // of the current block, ascending
  int segment_count;
  int low, high;  // keys of the current block that some lane sees

  /// Takes the intervals of `entries` entries of the part, from `first` on.
  COTERIE_INLINE void look(const AttentionPart<T>& part, Index first, int entries) {
    count = entries;
    vectors = (count + lanes - 1) / lanes;
    intervals = part.visible_too ? 2 : 1;
    for (int i = 0; i < intervals; ++i) {
      const Interval* visible_here = (i ? part.visible_too : part.visible) + first;
      for (int v = 0; v < vectors; ++v) {
        int latest = 0, earliest = none;
        for (int l = v * lanes; l < (v + 1) * lanes; ++l) {
          // Lanes without an entry see what the last entry sees; their queries and gradients are zero.
          const Interval seen = visible_here[std::min(l, count - 1)];
          from[i][l] = seen.begin;
          until[i][l] = seen.end;
          latest = std::max(latest, seen.begin);
          earliest = std::min(earliest, seen.end);
        }
        all_from[i][v] = latest;
        all_until[i][v] = earliest;
      }
    }
  }

  COTERIE_INLINE bool sees_any(int l) const {
    return from[0][l] < until[0][l] || (intervals == 2 && from[1][l] < until[1][l]);
  }

  /// The first key at or after `key` that some lane sees; `none` if there is none.
  COTERIE_INLINE int next_key(int key) const {
    Integer next = none;
    for (int i = 0; i < intervals; ++i)
      for (int l = 0; l < vectors * lanes; ++l) {
        const Integer seen = std::max<Integer>(from[i][l], key);
        next = seen < until[i][l] ? std::min(next, seen) : next;
      }
    return static_cast<int>(next);
  }

  /// The mask of vector v for key rank `key`.
  COTERIE_INLINE void visible(int v, int key, I& mask) const {
    const I rank = I{} + static_cast<Integer>(key);
    mask = (at(from[0], v) <= rank) & (at(until[0], v) > rank);
    if (intervals == 2) mask |= (at(from[1], v) <= rank) & (at(until[1], v) > rank);
  }

  /// Whether lanes of vector v have no entry; and the mask without them: an unused lane's 0 * infinity is no number.
  COTERIE_INLINE bool partial(int v) const { return (v + 1) * lanes > count; }
  COTERIE_INLINE void used(int v, int key, I& mask) const {
    visible(v, key, mask);
    for (int l = std::max(count - v * lanes, 0); l < lanes; ++l) mask[l] = 0;
  }

  /// Whether every lane of vector v sees keys [begin, end).
  COTERIE_INLINE bool all_see(int v, int begin, int end) const {
    for (int i = 0; i < intervals; ++i)
      if (all_from[i][v] <= begin && end <= all_until[i][v]) return true;
    return false;
  }

  /// Cuts the block that begins at `block_begin` into segments of which the same vectors see something.
  COTERIE_INLINE void cut(int block_begin) {
    const int block_end = block_begin + key_block;
    bool whole = true;
    for (int v = 0; v < vectors; ++v) whole &= all_see(v, block_begin, block_end);
    if (whole) {
      segments[0] = {block_begin, block_end, 0, vectors, false};
      segment_count = 1;
      low = block_begin;
      high = block_end;
      return;
    }
    int begins[2][V], ends[2][V], cuts[4 * V], cut_count = 0;
    for (int v = 0; v < vectors; ++v)
      for (int i = 0; i < intervals; ++i) {
        Integer first = block_end, last = block_begin;
        for (int l = v * lanes; l < (v + 1) * lanes; ++l) {
          const Integer begin = std::max<Integer>(from[i][l], block_begin);
          const Integer end = std::min<Integer>(until[i][l], block_end);
          first = begin < end ? std::min(first, begin) : first;
          last = begin < end ? std::max(last, end) : last;
        }
        begins[i][v] = static_cast<int>(first);
        ends[i][v] = static_cast<int>(last);
        if (first >= last) continue;
        insert(cuts, cut_count, begins[i][v]);
        insert(cuts, cut_count, ends[i][v]);
      }
    segment_count = 0;
    low = block_end;
    high = block_begin;
    for (int c = 0; c + 1 < cut_count; ++c) {
      Segment s{cuts[c], cuts[c + 1], V, 0, false};
      for (int v = 0; v < vectors; ++v)
        for (int i = 0; i < intervals; ++i)
          if (begins[i][v] <= s.begin && s.end <= ends[i][v]) {
            s.first = std::min(s.first, v);
            s.last = v + 1;
          }
      if (s.first >= s.last) continue;
      for (int v = s.first; v < s.last; ++v) s.masked |= !all_see(v, s.begin, s.end);
      segments[segment_count++] = s;
      low = std::min(low, s.begin);
      high = std::max(high, s.end);
    }
  }

 private:
  static COTERIE_INLINE const I& at(const Integer* p, int v) { return *reinterpret_cast<const I*>(p + v * lanes); }

  /// Keeps `cuts` ascending and without repetition.
  static COTERIE_INLINE void insert(int* cuts, int& cut_count, int bound) {
    int place = cut_count;
    while (place > 0 && cuts[place - 1] > bound) --place;
    if (place > 0 && cuts[place - 1] == bound) return;
    for (int c = cut_count; c > place; --c) cuts[c] = cuts[c - 1];
    cuts[place] = bound;
    ++cut_count;
  }
};

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
