// A few queries against the keys that they see: lanes are keys. For decoding, and for tiles that would be mostly empty.
//
//     S[key]   = sum_d Kt[d][key] q[d]          keys are transposed, a block at a time, for all the queries
//     online softmax along the block
//     O[c]    += sum_key P[key] V[key][c]       V's rows read in place
//
// The same operations in the same order as in the forward tile, so a row has the same bits here and there.
#pragma once

#include <limits>

#include "coterie/kernel/tile.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

template <class T, class M>
struct FewQueries {
  using L = typename M::L;
  using F = typename L::F;
  static constexpr int lanes = L::count;
  static constexpr T lowest = std::numeric_limits<T>::lowest();

  /// Tiles of at most so many queries cost less here: a transposition of the keys is for all of them, a lane for one.
  static constexpr int most = lanes >= 8 ? 3 * lanes / 8 : 1;

  struct State {
    T reference, sum;
    T *q, *out;
  };

  static constexpr Index scratch_size(Index d, Index dv) {
    return (padded(d) + 1) * key_block + most * (padded(d) + padded(dv));
  }

  static COTERIE_INLINE void run(const AttentionArguments<T>& arguments, Index first, int count, T* scratch) {
    T* keys = scratch;  // [d][key_block]
    T* scores = keys + padded(arguments.d) * key_block;
    State states[most];
    T* rows = scores + key_block;
    for (int r = 0; r < count; ++r, rows += padded(arguments.d) + padded(arguments.dv)) {
      states[r] = {lowest, 0, rows, rows + padded(arguments.d)};
      Tile<T, M>::scale_row(arguments.q.row(arguments.rows[first + r]), arguments.scale * log2_e<T>, arguments.d,
                            states[r].q);
      std::memset(states[r].out, 0, static_cast<std::size_t>(padded(arguments.dv)) * sizeof(T));
    }
    Visibility<T, M> visibility;
    visibility.take(arguments, first, count);
    typename Tile<T, M>::Following following(arguments, first, visibility.blocks());
    const bool scattered =
        visibility.newest - visibility.oldest > lanes && !arguments.side_by_side(visibility.oldest, visibility.newest);
    int block_begin = visibility.first_block();
    if (scattered) fetch_block(arguments, visibility, block_begin, true, false);
    while (block_begin != Visibility<T, M>::none) {
      const int next = visibility.next_block(block_begin);
      following.fetch();
      if (scattered) {
        fetch_block(arguments, visibility, block_begin, false, true);
        if (next != Visibility<T, M>::none) fetch_block(arguments, visibility, next, true, false);
      }
      block(arguments, first, count, block_begin, states, keys, scores);
      block_begin = next;
    }
    for (int r = 0; r < count; ++r) {
      const bool sees = visibility.sees_any(r);
      const T inverse = sees ? T(1) / states[r].sum : T(0);
      const Index target = arguments.target(first + r);
      F log_sum;
      L::log(F{} + states[r].sum, log_sum);
      Tile<T, M>::write_state(arguments, target, states[r].reference, log_sum[0], inverse, sees);
      Tile<T, M>::scale_row(states[r].out, inverse, arguments.dv, arguments.out + target * arguments.out_stride);
    }
  }

  /// The keys and the values of ranks [begin, end), of which rows that follow each other cost little.
  static COTERIE_INLINE void locate(const AttentionArguments<T>& arguments, Index begin, Index end, const T** k_rows,
                                    const T** v_rows) {
    const std::int32_t *const keys = arguments.keys + begin, first = keys[0],
                              count = static_cast<std::int32_t>(end - begin);
    std::uint32_t elsewhere = 0;
    for (std::int32_t i = 0; i < count; ++i)
      elsewhere |= std::uint32_t(keys[i]) - std::uint32_t(first) - std::uint32_t(i);
    if (elsewhere == 0 && first + (end - begin) <= arguments.k.rows && !arguments.gathered_k)
      for (Index i = 0; i < count; ++i) {
        k_rows[i] = arguments.k.data + (first + i) * arguments.k.stride;
        v_rows[i] = arguments.v.data + (first + i) * arguments.v.stride;
      }
    else
      for (Index i = 0; i < count; ++i) arguments.locate(begin + i, k_rows[i], v_rows[i]);
  }

  /// Prefetches the keys, or the values, of a block: key/value caches of many heads exceed the processor's.
  static COTERIE_INLINE void fetch_block(const AttentionArguments<T>& arguments, const Visibility<T, M>& visibility,
                                         int block_begin, bool keys, bool values) {
    M::apart([&]() __attribute__((always_inline)) {
      const int begin = (std::max)(block_begin, visibility.oldest),
                end = (std::min)(block_begin + key_block, visibility.newest);
      const T* k_rows[key_block];
      const T* v_rows[key_block];
      locate(arguments, begin, end, k_rows, v_rows);
      for (int j = 0; j < end - begin; ++j) {
        if (keys) L::fetch(k_rows[j], arguments.d);
        if (values) L::fetch(v_rows[j], arguments.dv);
      }
    });
  }

  /// The ranks of a block that an entry sees, as an interval inside the block; interval 0 or 1.
  static COTERIE_INLINE Interval seen(const AttentionArguments<T>& arguments, Index entry, int interval,
                                      int block_begin) {
    const Interval* visible = interval ? arguments.visible_too : arguments.visible;
    if (!visible) return {0, 0};
    const std::int32_t begin = (std::max)(visible[entry].begin - block_begin, 0);
    const std::int32_t end = (std::min)(visible[entry].end - block_begin, key_block);
    return {begin, (std::max)(begin, end)};
  }

  static COTERIE_INLINE void block(const AttentionArguments<T>& arguments, Index first, int count, int block_begin,
                                   State* states, T* keys, T* scores) {
    int low = key_block, high = 0;
    for (int r = 0; r < count; ++r)
      for (int i = 0; i < 2; ++i) {
        const Interval s = seen(arguments, first + r, i, block_begin);
        if (s.begin == s.end) continue;
        low = (std::min)(low, int(s.begin));
        high = (std::max)(high, int(s.end));
      }
    const T* k_rows[key_block];
    const T* v_rows[key_block];
    const int seen_low = low;  // a part's copies hold no key below it
    low = low / lanes * lanes;
    const int vectors = (high - low + lanes - 1) / lanes;
    locate(arguments, block_begin + seen_low, block_begin + high, k_rows + seen_low, v_rows + seen_low);
    for (int j = low; j < seen_low; ++j) k_rows[j] = k_rows[seen_low];
    for (int j = high; j < low + vectors * lanes; ++j) k_rows[j] = k_rows[high - 1];
    if (count > 1) M::gather_columns(k_rows + low, vectors, arguments.d, T(1), keys + low, key_block);
    for (int r = 0; r < count; ++r) {
      const Interval one = seen(arguments, first + r, 0, block_begin), two = seen(arguments, first + r, 1, block_begin);
      if (one.begin == one.end && two.begin == two.end) continue;
      State& state = states[r];
      if (count > 1)
        M::row_product(state.q, arguments.d, keys + low, key_block, scores + low, vectors, false);
      else
        M::row_dots(k_rows + low, arguments.d, state.q, scores + low, vectors);
      for (int v = 0; v < vectors && arguments.soft_cap != 0; ++v) {
        F tanh;
        Tile<T, M>::cap(arguments, scores + low + v * lanes, tanh);
      }
      mask(arguments, first + r, block_begin, low, low + vectors * lanes, one, two, scores);
      softmax(scores, low, low + vectors * lanes, arguments.dv, state);
      for (const Interval& s : {one, two})
        if (s.begin < s.end) {
          const bool drops = arguments.dropout_bound != 0;
          T kept_sum = 0;  // not used: drop() has added all of P
          if (drops) drop(arguments, first + r, block_begin, s, scores, state.sum);
          M::row_values(scores, v_rows, s.begin, s.end, arguments.dv, state.out, drops ? kept_sum : state.sum);
        }
    }
  }

  /// Adds the probabilities of an interval to the sum, then drops pairs.
  static COTERIE_INLINE void drop(const AttentionArguments<T>& arguments, Index entry, int block_begin,
                                  const Interval& s, T* scores, T& sum) {
    M::apart([&]() __attribute__((always_inline)) {
      const std::uint32_t query_bits = arguments.query_bits(entry);
      for (int j = s.begin; j < s.end; ++j) {
        sum += scores[j];
        const bool kept = pair_bits(query_bits ^ arguments.key_bits(block_begin + j)) >= arguments.dropout_bound;
        scores[j] = kept ? scores[j] * arguments.dropout_scale : T(0);
      }
    });
  }

  /// Adds the bias, and hides what the entry does not see.
  static COTERIE_INLINE void mask(const AttentionArguments<T>& arguments, Index entry, int block_begin, int begin,
                                  int end, const Interval& one, const Interval& two, T* scores) {
    M::apart([&]() __attribute__((always_inline)) {
      if (arguments.bias)
        for (const Interval& s : {one, two})
          for (int j = s.begin; j < s.end; ++j) {
            if (!arguments.has_position(block_begin + j)) continue;
            const Index distance =
                arguments.query_position(entry) - arguments.key_position(block_begin + j) - arguments.bias_first;
            T added = arguments.bias[std::clamp<Index>(distance, 0, arguments.bias_count - 1)] * log2_e<T>;
            COTERIE_OPAQUE(added);  // rounded, as in the tile's table
            scores[j] += added;
          }
      for (int j = begin; j < end; ++j)
        if ((j < one.begin || j >= one.end) && (j < two.begin || j >= two.end)) scores[j] = lowest;
    });
  }

  /// P = 2^(S - reference), with the earlier sum and output rescaled where the reference moved, by the rule of tiles.
  static COTERIE_INLINE void softmax(T* scores, int begin, int end, Index columns, State& state) {
    F best = F{} + lowest, x;
    for (int j = begin; j < end; j += lanes) {
      L::load(scores + j, x);
      best = x > best ? x : best;
    }
    T most_here = lowest;
    for (int l = 0; l < lanes; ++l) most_here = best[l] > most_here ? best[l] : most_here;
    const T old = state.reference;
    state.reference = most_here > old + max_slack<T> ? most_here : old;
    const T safe = state.reference == lowest ? T(0) : state.reference;
    if (state.reference > old && old > lowest) {
      F factor;
      L::exp2(F{} + (old - safe), factor);
      state.sum *= factor[0];
      for (Index c = 0; c < padded(columns); c += lanes) {
        L::load(state.out + c, x);
        L::store(state.out + c, x * factor);
      }
    }
    for (int j = begin; j < end; j += lanes) {
      F p;
      L::load(scores + j, x);
      L::exp2(x - (F{} + safe), p);
      L::store(scores + j, p);
    }
  }
};

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
