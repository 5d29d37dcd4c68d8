// What the forward and the backward tile share: packing queries, bias by distance, sums down the keys.
//
// A tile is up to `width` consecutive entries of a part, one per vector lane: lanes are queries. Their rows are
// transposed once; keys and values are read in place, block after block of the group's key list.
//
// Logits are kept to base 2, times log2(e) by way of queries and bias, for 2^x is what machines do best.
//
// The row invariant: a lane's numbers come from the same operations in the same order whatever the other lanes see.
// Blocks are cut at multiples of `key_block` in the group's key list; sums run key by key; a masked key adds an exact
// zero.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>

#include "coterie/kernel/micro.hpp"
#include "coterie/kernel/relative.hpp"
#include "coterie/kernel/visibility.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

template <class T, class M>
struct Tile {
  using L = typename M::L;
  using F = typename L::F;
  using Ints = typename L::Ints;
  static constexpr int lanes = L::count, width = M::width;

  /// to[c] = from[c] * factor
  static COTERIE_INLINE void scale_row(const T* from, T factor, Index columns, T* to) {
    Index c = 0;
    // Few instructions a row, so that the machine has several rows under way at once.
    for (; c + 4 * lanes <= columns; c += 4 * lanes) COTERIE_UNROLL for (int v = 0; v < 4; ++v) {
        F x;
        L::load(from + c + v * lanes, x);
        L::store(to + c + v * lanes, x * factor);
      }
    for (; c + lanes <= columns; c += lanes) {
      F x;
      L::load(from + c, x);
      L::store(to + c, x * factor);
    }
    for (; c < columns; ++c) to[c] = from[c] * factor;
  }

  /// to[c] += from[c] * factor
  static COTERIE_INLINE void add_scaled(const T* from, T factor, Index columns, T* to) {
    Index c = 0;
    for (; c + lanes <= columns; c += lanes) {
      F x, y;
      L::load(from + c, x);
      L::load(to + c, y);
      L::store(to + c, y + x * factor);
    }
    for (; c < columns; ++c) to[c] += from[c] * factor;
  }

  /// to[rows[i] - first][c] += from[i][c]
  static COTERIE_INLINE void add_rows(const RowSums<T>& sums) {
    constexpr Index ahead = 4;
    for (Index i = 0; i < sums.count; ++i) {
      if (i + ahead < sums.count)
        L::fetch(sums.to + (sums.rows[i + ahead] - sums.first) * sums.to_stride, sums.columns);
      add_scaled(sums.from + i * sums.from_stride, T(1), sums.columns,
                 sums.to + (sums.rows[i] - sums.first) * sums.to_stride);
    }
  }

  /// Numbers of scratch memory that gather() may use where there are `keys` key rows.
  static constexpr Index gather_size(Index d, Index dv, Index keys) {
    return (std::min)(keys, most_gathered) * (padded(d) + padded(dv));
  }

  /// Copies the keys and values that a part sees into `scratch` where they lie far apart and several tiles read them:
  /// rows of many heads are a power of two apart and fall on few sets of a cache. Rows that lie side by side are copied
  /// where `bytes_in_place` do not hold all of them: rows of a cluster are on many pages then.
  static COTERIE_INLINE void gather(AttentionArguments<T>& arguments, Index bytes_in_place, T* scratch) {
    M::apart([&]() __attribute__((always_inline)) {
      if (arguments.entries < 3 * width) return;
      if (arguments.without_gaps() &&
          arguments.k.rows * (arguments.d + arguments.dv) * Index(sizeof(T)) <= bytes_in_place)
        return;
      Index begin = (std::numeric_limits<std::int32_t>::max)(), end = 0;
      for (const Interval* visible : {arguments.visible, arguments.visible_too})
        for (Index e = 0; visible && e < arguments.entries; ++e)
          if (visible[e].begin < visible[e].end) {
            begin = std::min<Index>(begin, visible[e].begin);
            end = std::max<Index>(end, visible[e].end);
          }
      if (begin >= end || end - begin > most_gathered) return;
      if (arguments.side_by_side(begin, end)) return;
      T* const k = scratch;
      T* const v = scratch + (end - begin) * padded(arguments.d);
      constexpr Index ahead = 8;
      for (Index rank = begin; rank < end; ++rank) {
        if (rank + ahead < end) fetch_key(arguments, rank + ahead);
        const Index key = arguments.keys[rank], to = rank - begin;
        scale_row(arguments.k.row(key), T(1), arguments.d, k + to * padded(arguments.d));
        scale_row(arguments.v.row(key), T(1), arguments.dv, v + to * padded(arguments.dv));
      }
      arguments.gathered_k = k;
      arguments.gathered_v = v;
      arguments.gathered_first = begin;
    });
  }

  static COTERIE_INLINE void fetch_key(const AttentionArguments<T>& arguments, Index rank) {
    L::fetch(arguments.k.row(arguments.keys[rank]), arguments.d);
    L::fetch(arguments.v.row(arguments.keys[rank]), arguments.dv);
  }

  /// The tile that follows the one at `first`, of the same part or of the next one. Rows sorted by cluster lie
  /// scattered, and the machine cannot guess the next one: while a tile computes, it prefetches what the following one
  /// reads and writes first. A few rows at a time: many wait for each other.
  struct Following {
    const AttentionArguments<T>* arguments;
    Index entry, end, at_once;

    /// `calls`: how often fetch() will be called.
    COTERIE_INLINE Following(const AttentionArguments<T>& now, Index first, Index calls)
        : arguments(&now), entry(first + width), end(0) {
      if (entry >= now.entries) {
        arguments = now.next;
        entry = 0;
      }
      if (arguments) end = std::min<Index>(entry + width, arguments->entries);
      at_once = (end - entry + calls - 1) / calls;
    }

    /// Prefetches query, output, state, newest key and value of the next entries, and what also(part, entry) does.
    template <class Also>
    COTERIE_INLINE void fetch(const Also& also) {
      for (const Index until = (std::min)(entry + at_once, end); entry < until; ++entry) {
        const Index target = arguments->target(entry);
        L::fetch(arguments->q.row(arguments->rows[entry]), arguments->d);
        L::fetch(arguments->out + target * arguments->out_stride, arguments->dv);
        if (entry == 0 || (target - arguments->target(entry - 1)) * arguments->states.stride != 1)
          for (const T* state : {arguments->states.reference, arguments->states.inverse, arguments->states.lse})
            if (state) __builtin_prefetch(state + target * arguments->states.stride, 0, 2);
        const Interval seen = arguments->visible[entry];
        if (!arguments->gathered_k && seen.begin < seen.end) fetch_key(*arguments, seen.end - 1);
        also(*arguments, entry);
      }
    }
    COTERIE_INLINE void fetch() {
      fetch([](const AttentionArguments<T>&, Index) {});
    }
  };

  /// Writes what the tape keeps of a row.
  static COTERIE_INLINE void write_state(const AttentionArguments<T>& arguments, Index target, T reference, T log_sum,
                                         T inverse, bool sees) {
    const Index at = target * arguments.states.stride;
    if (arguments.states.reference) arguments.states.reference[at] = reference;
    if (arguments.states.inverse) arguments.states.inverse[at] = inverse;
    if (arguments.states.lse)
      arguments.states.lse[at] = sees ? reference * ln_2<T> + log_sum : -std::numeric_limits<T>::infinity();
  }

  /// Copies row(lane) times factor(lane) into `rows[lane][padded(columns)]`, and transposes that into
  /// `transposed[column][lane]`. Lanes without an entry become zero.
  template <class Row, class Factor>
  static COTERIE_INLINE void pack(const Visibility<T, M>& visibility, Index columns, T* rows, T* transposed,
                                  const Row& row, const Factor& factor) {
    const Index stride = padded(columns);
    for (int l = 0; l < visibility.vectors * lanes; ++l) {
      T* to = rows + l * stride;
      if (l < visibility.count) {
        scale_row(row(l), factor(l), columns, to);
        for (Index c = columns; c < stride; ++c) to[c] = 0;
      } else {
        std::memset(to, 0, static_cast<std::size_t>(stride) * sizeof(T));
      }
    }
    M::transpose_in(rows, stride, visibility.vectors, columns, transposed);
  }

  /// transposed[column][lane] = 0 for the vectors in use, and columns up to a whole vector of them.
  static COTERIE_INLINE void clear(const Visibility<T, M>& visibility, Index columns, T* transposed) {
    const T* const end = transposed + (columns + lanes - 1) / lanes * lanes * width;
    for (int v = 0; v < visibility.vectors; ++v)
      for (T* to = transposed + v * lanes; to < end; to += width) L::store(to, F{});
  }

  /// score = cap tanh(score / cap) of one vector; y = tanh(score / cap). The one formula, so that rows have the same
  /// bits in tiles and alone.
  static COTERIE_INLINE void cap(const AttentionArguments<T>& arguments, T* score, F& y) {
    F x;
    L::load(score, x);
    L::tanh(x * (T(1) / arguments.soft_cap), y);
    L::store(score, y * arguments.soft_cap);
  }

  /// Caps the scores of a segment; `slope`, if wanted, the derivative, in rows of `width` as the scores.
  static COTERIE_INLINE void cap_scores(const AttentionArguments<T>& arguments, const KeySegment& s, int block_begin,
                                        T* scores, T* slope) {
    M::apart([&]() __attribute__((always_inline)) {
      for (int key = s.begin; key < s.end; ++key)
        for (int v = s.first; v < s.last; ++v) {
          const Index at = (key - block_begin) * width + v * lanes;
          F y;
          cap(arguments, scores + at, y);
          if (slope) L::store(slope + at, T(1) - y * y);
        }
    });
  }

  /// Drops pairs of the segment: 0 for those, and dropout_scale times the value for the others.
  static COTERIE_INLINE void drop(const AttentionArguments<T>& arguments, Index first,
                                  const Visibility<T, M>& visibility, const KeySegment& s, int block_begin, T* values) {
    M::apart([&]() __attribute__((always_inline)) {
      using Unsigned = typename L::Unsigned;
      using U = typename L::U;
      alignas(64) Unsigned queries[width];
      for (int l = s.first * lanes; l < s.last * lanes; ++l)
        queries[l] = arguments.query_bits(first + (std::min)(l, visibility.count - 1));
      for (int key = s.begin; key < s.end; ++key) {
        const Unsigned key_bits = arguments.key_bits(key);
        for (int v = s.first; v < s.last; ++v) {
          T* const at = values + (key - block_begin) * width + v * lanes;
          U bits = *reinterpret_cast<const U*>(queries + v * lanes) ^ key_bits;
          L::pair_bits(bits);
          const Ints kept = bits >= Unsigned(arguments.dropout_bound);
          F x;
          L::load(at, x);
          x = kept ? x * arguments.dropout_scale : F{};
          L::store(at, x);
        }
      }
    });
  }

  /// The bias table, to base 2, with its end columns repeated `width` times on both sides: lanes at or beyond an end,
  /// and those that ascend by one, find theirs side by side.
  static COTERIE_INLINE void pad_bias(const AttentionArguments<T>& arguments, T* table) {
    for (Index i = 0; i < arguments.bias_count + 2 * width; ++i)
      table[i] = arguments.bias[std::clamp<Index>(i - width, 0, arguments.bias_count - 1)] * log2_e<T>;
  }

  /// Calls whole(at, column) for vectors of pairs whose columns of the padded table lie side by side, and single(at,
  /// column) for the other pairs.
  template <class Whole, class Single>
  static COTERIE_INLINE void each_bias(const AttentionArguments<T>& arguments, const TilePositions<T, M>& positions,
                                       const KeySegment& s, int block_begin, const Whole& whole, const Single& single) {
    const Index end = arguments.bias_count - 1;
    const auto pairs = [&](Index at, int v, Index low, Index high) __attribute__((always_inline)) {
      if (high <= 0)
        whole(at, Index(0));
      else if (low >= end)
        whole(at, arguments.bias_count + width);
      else if (positions.ascending[v])
        whole(at, low + width);
      else
        for (int l = 0; l < lanes; ++l)
          single(at + l, std::clamp<Index>(low + positions.above[v * lanes + l], 0, end) + width);
    };
    positions.each(arguments.bias_first, s, block_begin, pairs);
  }

  static COTERIE_INLINE void add_bias(const AttentionArguments<T>& arguments, const TilePositions<T, M>& positions,
                                      const KeySegment& s, int block_begin, const T* table, T* scores) {
    M::apart([&]() __attribute__((always_inline)) {
      const auto whole = [&](Index at, Index column) __attribute__((always_inline)) {
        L::add(table + column, scores + at);
      };
      const auto single = [&](Index at, Index column) __attribute__((always_inline)) { scores[at] += table[column]; };
      each_bias(arguments, positions, s, block_begin, whole, single);
    });
  }

  /// Masked pairs and those of lanes without an entry must be zero.
  static COTERIE_INLINE void add_bias_gradient(const AttentionArguments<T>& arguments,
                                               const TilePositions<T, M>& positions, const KeySegment& s,
                                               int block_begin, const T* d_scores, T* table) {
    M::apart([&]() __attribute__((always_inline)) {
      const auto whole = [&](Index at, Index column) __attribute__((always_inline)) {
        L::add(d_scores + at, table + column);
      };
      const auto single = [&](Index at, Index column) __attribute__((always_inline)) { table[column] += d_scores[at]; };
      each_bias(arguments, positions, s, block_begin, whole, single);
    });
  }

  /// Ot[c][lane] += sum over the segment's keys of rows[key][c] P[key][lane].
  static COTERIE_INLINE void accumulate_columns(const Visibility<T, M>& visibility, const KeySegment& s,
                                                int block_begin, const T* const* rows, Index columns, const T* p,
                                                T* out) {
    const int begin = s.begin - block_begin, end = s.end - block_begin, first = s.first * lanes;
    const Index from = M::columns(rows, begin, end, columns, p + first, out + first, s.last - s.first, s.masked);
    if (from == columns) return;
    // A non-finite row met a masked lane: 0 * NaN must not reach it. The same operations, kept only under the mask.
    for (Index c = from; c < columns; ++c)
      for (int v = s.first; v < s.last; ++v) {
        F sum, x;
        L::load(out + c * width + v * lanes, sum);
        typename Visibility<T, M>::Mask mask;
        visibility.visible(v, mask);
        for (int j = begin; j < end; ++j) {
          Ints sees;
          mask.of(block_begin + j, sees);
          L::load(p + j * width + v * lanes, x);
          F next = sum;
          L::add_product(rows[j][c], x, next);
          sum = sees < 0 ? next : sum;
        }
        L::store(out + c * width + v * lanes, sum);
      }
  }
};

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
