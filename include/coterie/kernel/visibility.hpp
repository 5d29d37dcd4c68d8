// Which lanes of a tile see which keys, block after block of the key list.
#pragma once

#include <algorithm>
#include <limits>

#include "coterie/kernel/arguments.hpp"
#include "coterie/kernel/lanes.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

/// Keys [begin, end) that vectors [first, last) of a tile's lanes see; masked: some lane does not see all of them.
struct KeySegment {
  int begin, end, first, last;
  bool masked;
};

/// The intervals of a tile's lanes, for tiles of `M::width` lanes.
template <class T, class M>
struct Visibility {
  using L = typename M::L;
  using Ints = typename L::Ints;
  using Integer = typename L::Integer;
  static constexpr int lanes = L::count, width = M::width, V = width / lanes;
  static constexpr int none = (std::numeric_limits<int>::max)();

  alignas(64) Integer from[2][width];  // per interval and lane: keys [from, until)
  alignas(64) Integer until[2][width];
  int oldest, newest;                   // every key that a lane sees is in [oldest, newest)
  int all_from[2][V], all_until[2][V];  // keys that every lane of the vector sees
  int intervals, vectors, count;        // intervals in use, vectors in use, lanes with an entry
  KeySegment segments[4 * V];           // of the current block, ascending for each vector
  int segment_count;
  int low, high;  // keys of the current block that some lane sees

  /// Takes the intervals of `entries` entries of the part, from `first` on.
  COTERIE_INLINE void take(const AttentionArguments<T>& arguments, Index first, int entries) {
    count = entries;
    vectors = (count + lanes - 1) / lanes;
    intervals = arguments.visible_too ? 2 : 1;
    oldest = none;
    newest = 0;
    for (int i = 0; i < intervals; ++i) {
      const Interval* visible_here = (i ? arguments.visible_too : arguments.visible) + first;
      for (int v = 0; v < vectors; ++v) {
        int latest = 0, earliest = none;
        for (int l = v * lanes; l < (v + 1) * lanes; ++l) {
          // Lanes without an entry see what the last entry sees; their queries and gradients are zero.
          const Interval seen = visible_here[(std::min)(l, count - 1)];
          from[i][l] = seen.begin;
          until[i][l] = seen.end;
          if (seen.begin < seen.end) {
            oldest = (std::min)(oldest, seen.begin);
            newest = (std::max)(newest, seen.end);
          }
          latest = (std::max)(latest, seen.begin);
          earliest = (std::min)(earliest, seen.end);
        }
        all_from[i][v] = latest;
        all_until[i][v] = earliest;
      }
    }
  }

  /// Blocks from the first to the last one that is seen.
  COTERIE_INLINE int blocks() const { return oldest < newest ? (newest - 1) / key_block - oldest / key_block + 1 : 1; }

  COTERIE_INLINE bool sees_any(int l) const {
    return from[0][l] < until[0][l] || (intervals == 2 && from[1][l] < until[1][l]);
  }

  COTERIE_INLINE bool sees(int l, int key) const {
    return (from[0][l] <= key && key < until[0][l]) || (intervals == 2 && from[1][l] <= key && key < until[1][l]);
  }

  /// Negative in lanes of vector v that see any key.
  COTERIE_INLINE void sees_any(int v, Ints& sees) const {
    sees = at(from[0], v) - at(until[0], v);
    if (intervals == 2) sees |= at(from[1], v) - at(until[1], v);
  }

  /// Where the block of the first key that some lane sees begins, and the one after a block; `none` if there is none.
  COTERIE_INLINE int first_block() const { return oldest < newest ? oldest / key_block * key_block : none; }
  COTERIE_INLINE int next_block(int block_begin) const {
    const int next = block_begin + key_block;
    if (next >= newest) return none;
    if (all_reach(next)) return next;
    return next_key(next) / key_block * key_block;
  }

  /// Which lanes of a vector see a key: two subtractions an interval, for g++ takes comparisons joined by & apart, lane
  /// by lane.
  struct Mask {
    Ints before[2], until[2];
    int intervals;

    /// Negative in lanes that see key rank `key`.
    COTERIE_INLINE void of(int key, Ints& mask) const {
      const Ints rank = Ints{} + static_cast<Integer>(key);
      mask = (before[0] - rank) & (rank - until[0]);
      if (intervals == 2) mask |= (before[1] - rank) & (rank - until[1]);
    }
  };

  COTERIE_INLINE void visible(int v, Mask& mask) const {
    mask.intervals = intervals;
    for (int i = 0; i < intervals; ++i) {
      mask.before[i] = at(from[i], v) - 1;
      mask.until[i] = at(until[i], v);
    }
  }

  /// Whether lanes of vector v have no entry; and the mask without them: an unused lane's 0 * infinity is no number.
  COTERIE_INLINE bool partial(int v) const { return (v + 1) * lanes > count; }
  COTERIE_INLINE void used(int v, Mask& mask) const {
    visible(v, mask);
    for (int i = 0; i < intervals; ++i)
      for (int l = (std::max)(count - v * lanes, 0); l < lanes; ++l) mask.until[i][l] = 0;
  }

  /// Whether every lane of vector v sees keys [begin, end).
  COTERIE_INLINE bool all_see(int v, int begin, int end) const {
    for (int i = 0; i < intervals; ++i)
      if (all_from[i][v] <= begin && end <= all_until[i][v]) return true;
    return false;
  }

  /// Keys [begin, end) of a segment that every lane of vector v sees; the others are masked.
  COTERIE_INLINE void unmasked(const KeySegment& s, int v, int& begin, int& end) const {
    begin = end = s.begin;
    for (int i = 0; i < intervals; ++i) {
      const int first = (std::max)(all_from[i][v], s.begin), last = (std::min)(all_until[i][v], s.end);
      if (last - first > end - begin) begin = first, end = last;
    }
  }

  /// Cuts the block that begins at `block_begin` into segments of which the same vectors see something.
  COTERIE_INLINE void cut_by_keys(int block_begin) {
    if (whole(block_begin)) return;
    int begins[2][V], ends[2][V], cuts[4 * V], cut_count = 0;
    for (int v = 0; v < vectors; ++v)
      for (int i = 0; i < intervals; ++i) {
        seen(v, i, block_begin, begins[i][v], ends[i][v]);
        if (begins[i][v] >= ends[i][v]) continue;
        insert(cuts, cut_count, begins[i][v]);
        insert(cuts, cut_count, ends[i][v]);
      }
    for (int c = 0; c + 1 < cut_count; ++c) {
      KeySegment s{cuts[c], cuts[c + 1], V, 0, false};
      for (int v = 0; v < vectors; ++v)
        for (int i = 0; i < intervals; ++i)
          if (begins[i][v] <= s.begin && s.end <= ends[i][v]) {
            s.first = (std::min)(s.first, v);
            s.last = v + 1;
          }
      if (s.first >= s.last) continue;
      for (int v = s.first; v < s.last; ++v) s.masked |= !all_see(v, s.begin, s.end);
      add(s);
    }
  }

  /// Cuts the block that begins at `block_begin` into segments of one vector each, two where its intervals leave a gap.
  COTERIE_INLINE void cut_by_vectors(int block_begin) {
    if (whole(block_begin)) return;
    for (int v = 0; v < vectors; ++v) {
      int begin, end, begin_too = 0, end_too = 0;
      seen(v, 0, block_begin, begin, end);
      if (intervals == 2) seen(v, 1, block_begin, begin_too, end_too);
      if (begin >= end || (begin_too < end_too && begin_too < begin)) {
        std::swap(begin, begin_too);
        std::swap(end, end_too);
      }
      if (begin_too < end_too && begin_too <= end) {
        end = (std::max)(end, end_too);
        end_too = begin_too;
      }
      if (begin < end) add({begin, end, v, v + 1, !all_see(v, begin, end)});
      if (begin_too < end_too) add({begin_too, end_too, v, v + 1, !all_see(v, begin_too, end_too)});
    }
  }

 private:
  /// Whether all lanes of some vector see the key.
  COTERIE_INLINE bool all_reach(int key) const {
    for (int v = 0; v < vectors; ++v)
      if (all_see(v, key, key + 1)) return true;
    return false;
  }

  /// The first key at or after `key` that some lane sees, if there is one.
  COTERIE_INLINE int next_key(int key) const {
    Integer next = none;
    for (int i = 0; i < intervals; ++i)
      for (int l = 0; l < vectors * lanes; ++l) {
        const Integer seen = std::max<Integer>(from[i][l], key);
        next = seen < until[i][l] ? (std::min)(next, seen) : next;
      }
    return static_cast<int>(next);
  }

  /// Makes the block one segment if every lane sees all of it, otherwise empties the list.
  COTERIE_INLINE bool whole(int block_begin) {
    const int block_end = block_begin + key_block;
    segment_count = 0;
    low = block_end;
    high = block_begin;
    for (int v = 0; v < vectors; ++v)
      if (!all_see(v, block_begin, block_end)) return false;
    add({block_begin, block_end, 0, vectors, false});
    return true;
  }

  /// Keys [begin, end) of a block from the first to the last one that a lane of vector v sees in interval i.
  COTERIE_INLINE void seen(int v, int i, int block_begin, int& begin, int& end) const {
    const Integer block_end = block_begin + key_block;
    Integer first = block_end, last = block_begin;
    for (int l = v * lanes; l < (v + 1) * lanes; ++l) {
      const Integer lane_begin = std::max<Integer>(from[i][l], block_begin);
      const Integer lane_end = std::min<Integer>(until[i][l], block_end);
      first = lane_begin < lane_end ? (std::min)(first, lane_begin) : first;
      last = lane_begin < lane_end ? (std::max)(last, lane_end) : last;
    }
    begin = static_cast<int>(first);
    end = static_cast<int>(last);
  }

  COTERIE_INLINE void add(const KeySegment& s) {
    segments[segment_count++] = s;
    low = (std::min)(low, s.begin);
    high = (std::max)(high, s.end);
  }

  static COTERIE_INLINE const Ints& at(const Integer* p, int v) {
    return *reinterpret_cast<const Ints*>(p + v * lanes);
  }

  /// Keeps `cuts` ascending and without repetition.
  static COTERIE_INLINE void insert(int* cuts, int& cut_count, int bound) {
    int index = cut_count;
    while (index > 0 && cuts[index - 1] > bound) --index;
    if (index > 0 && cuts[index - 1] == bound) return;
    for (int c = cut_count; c > index; --c) cuts[c] = cuts[c - 1];
    cuts[index] = bound;
    ++cut_count;
  }
};

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
