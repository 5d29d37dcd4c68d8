// Where a tile's queries and keys stand, for all terms by distance.
#pragma once

#include <algorithm>
#include <limits>

#include "coterie/kernel/visibility.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

/// The positions of a tile's queries, and of the keys of the current block.
template <class T, class M>
struct TilePositions {
  using L = typename M::L;
  static constexpr int lanes = L::count, width = M::width, V = width / lanes;

  Index lowest[V], highest[V];  // of a vector's lanes; those without an entry go on by one
  Index above[width];           // of a lane above its vector's lowest
  bool ascending[V];            // by one, lane after lane
  Index of_key[key_block];
  int key_begin, key_end;     // the block's keys that have a position
  Index key_least, key_most;  // bounds of those positions
  bool keys_ascend;           // by one, key after key

  COTERIE_INLINE void take(const AttentionArguments<T>& arguments, Index first, const Visibility<T, M>& visibility) {
    for (int v = 0; v < visibility.vectors; ++v) {
      Index* const here = above + v * lanes;
      ascending[v] = true;
      for (int l = 0; l < lanes; ++l) {
        const Index entry = first + v * lanes + l;
        here[l] = v * lanes + l < visibility.count ? arguments.query_position(entry) : here[l - 1] + 1;
        lowest[v] = l == 0 ? here[0] : (std::min)(lowest[v], here[l]);
        highest[v] = l == 0 ? here[0] : (std::max)(highest[v], here[l]);
        if (l > 0) ascending[v] &= here[l] == here[l - 1] + 1;
      }
      for (int l = 0; l < lanes; ++l) here[l] -= lowest[v];
    }
  }

  /// Turns to the block of keys that visibility was cut to.
  COTERIE_INLINE void turn_to_block(const AttentionArguments<T>& arguments, const Visibility<T, M>& visibility,
                                    int block_begin) {
    // Memory comes before all tokens or after.
    key_begin = visibility.low;
    key_end = visibility.high;
    while (key_begin < key_end && !arguments.has_position(key_begin)) ++key_begin;
    while (key_begin < key_end && !arguments.has_position(key_end - 1)) --key_end;
    keys_ascend = !arguments.key_positions && key_begin < key_end &&
                  arguments.keys[key_end - 1] - arguments.keys[key_begin] == key_end - 1 - key_begin;
    key_least = (std::numeric_limits<Index>::max)();
    key_most = (std::numeric_limits<Index>::min)();
    for (int key = key_begin; key < key_end; ++key) {
      const Index position = of_key[key - block_begin] = arguments.key_position(key);
      key_least = (std::min)(key_least, position);
      key_most = (std::max)(key_most, position);
    }
  }

  /// Calls f(at, v, low, high) for the segment's vectors and keys that have a position: `at` is the pairs' position in
  /// rows of `width` from the block's first key on, `low` and `high` bound their rows in a table whose row 0 is for
  /// distance `first`.
  template <class F>
  COTERIE_INLINE void each(Index first, const KeySegment& s, int block_begin, const F& f) const {
    const int begin = (std::max)(s.begin, key_begin) - block_begin, end = (std::min)(s.end, key_end) - block_begin;
    for (int v = s.first; v < s.last; ++v) {
      const Index low = lowest[v] - first, high = highest[v] - first;
      for (int j = begin; j < end; ++j) f(Index(j) * width + v * lanes, v, low - of_key[j], high - of_key[j]);
    }
  }
};

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
