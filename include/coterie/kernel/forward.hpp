// The forward tile: scores, online softmax, values.
//
//     S[key][lane]  = sum_d K[key][d] Qt[d][lane]      rows kernel: K's rows broadcast in place
//     online softmax down the keys, every lane on its own
//     Ot[d][lane]  += sum_key V[key][d] P[key][lane]   columns kernel: V's rows broadcast in place
//
// Relative keys join S before its soft cap, relative values join Ot at the end: see relative.hpp.
#pragma once

#include <limits>

#include "coterie/kernel/few_queries.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

template <class T, class M>
struct Forward {
  using Common = Tile<T, M>;
  using L = typename M::L;
  using F = typename L::F;
  using I = typename L::I;
  using Lookout = Sight<T, M>;
  using Distant = Relative<T, M>;
  static constexpr int lanes = L::count, width = M::width;
  static constexpr int at_once = 2 * M::most_rows;  // keys of a product between which rows are asked for
  static constexpr T lowest = std::numeric_limits<T>::lowest();

  // reference: the lowest number where a lane has seen nothing.
  struct Scratch {
    T *zeros, *q, *scores, *out, *bias, *reference, *sum, *factor, *by_key, *by_value;
  };

  static constexpr Index scratch_size(const PartSizes& sizes) {
    return tiles_size(sizes) + Common::gather_size(sizes.d, sizes.dv, sizes.keys);
  }
  static constexpr Index tiles_size(const PartSizes& sizes) {
    return std::max(tile_size(sizes), Row<T, M>::scratch_size(sizes.d, sizes.dv));
  }
  static constexpr Index tile_size(const PartSizes& sizes) {
    const Index d = padded(sizes.d), dv = padded(sizes.dv);
    return d + d * width + key_block * width + dv * width + padded(sizes.bias_count + 2 * width) + 3 * width +
           2 * Distant::buffer_size(sizes.relative_count) + Distant::scratch_size(sizes.relative_count);
  }

  static COTERIE_INLINE void run(const AttentionArguments<T>& given, T* scratch) {
    AttentionArguments<T> part = given;
    const PartSizes sizes = part.sizes();
    Common::gather(part, most_in_place, scratch + tiles_size(sizes));
    Scratch f;
    f.zeros = scratch;
    f.q = f.zeros + padded(part.d);
    f.scores = f.q + padded(part.d) * width;
    f.out = f.scores + key_block * width;
    f.bias = f.out + padded(part.dv) * width;
    f.reference = f.bias + padded(part.bias_count + 2 * width);
    f.sum = f.reference + width;
    f.factor = f.sum + width;
    f.by_key = f.factor + width;
    f.by_value = f.by_key + Distant::buffer_size(part.relative_count);
    T* const rest = f.by_value + Distant::buffer_size(part.relative_count);
    COTERIE_ASSERT(rest + Distant::scratch_size(part.relative_count) == scratch + tile_size(sizes));
    // Few queries take the path of rows, but not with relative keys or values: a table is for many.
    const Index few = part.relative_count > 0 ? 0 : Row<T, M>::most;
    if (part.bias && part.entries > few) Common::pad_bias(part, f.bias);
    TilePositions<T, M> positions;
    Distant relative;
    relative.begin(part, positions, rest);
    for (Index first = 0; first < part.entries; first += width) {
      const int count = static_cast<int>(std::min<Index>(width, part.entries - first));
      if (count <= few)
        Row<T, M>::run(part, first, count, scratch);
      else
        tile(part, first, count, f, positions, relative);
    }
  }

  static COTERIE_INLINE void tile(const AttentionArguments<T>& part, Index first, int count, const Scratch& f,
                                  TilePositions<T, M>& positions, Distant& relative) {
    Lookout sight;
    sight.look(part, first, count);
    // Lanes without an entry have queries of zero.
    std::memset(f.zeros, 0, static_cast<std::size_t>(part.d) * sizeof(T));
    const T* q_rows[width];
    for (int l = 0; l < sight.vectors * lanes; ++l) q_rows[l] = l < count ? part.q.row(part.rows[first + l]) : f.zeros;
    M::gather_columns(q_rows, sight.vectors, part.d, part.scale * log2_e<T>, f.q, width);
    for (int v = 0; v < sight.vectors; ++v) {
      L::store(f.reference + v * lanes, F{} + lowest);
      L::store(f.sum + v * lanes, F{});
    }
    Common::clear(sight, part.dv, f.out);
    if (part.bias || part.relative_count > 0) positions.look(part, first, sight);
    if (part.relative_count > 0) relative.look(sight);
    if (part.relative_keys)
      relative.products(sight, part.relative_keys, part.relative_keys_stride, part.d, f.q, f.by_key);
    if (part.relative_values) relative.clear(f.by_value);

    typename Common::Following following(part, first, (key_block / at_once) * sight.blocks());
    const T* k_rows[key_block];
    const T* v_rows[key_block];
    for (int block_begin = sight.first_block(); block_begin != Lookout::none;
         block_begin = sight.next_block(block_begin)) {
      sight.cut_by_vectors(block_begin);
      if (part.bias || part.relative_count > 0) positions.look_at_keys(part, sight, block_begin);
      if (part.relative_count > 0) relative.look_at_keys(sight, block_begin);
      for (int j = sight.low; j < sight.high; ++j) part.locate(j, k_rows[j - block_begin], v_rows[j - block_begin]);
      // S = K Qt
      for (int i = 0; i < sight.segment_count; ++i) {
        const typename Lookout::Segment& s = sight.segments[i];
        for (int j = s.begin; j < s.end; j += at_once) {
          following.fetch();
          M::scores(k_rows + (j - block_begin), std::min(at_once, s.end - j), part.d, f.q + s.first * lanes,
                    f.scores + (j - block_begin) * width + s.first * lanes, s.last - s.first);
        }
        if (part.relative_keys) relative.add(s, block_begin, f.by_key, f.scores);
        if (part.soft_cap != 0) Common::cap_scores(part, s, block_begin, f.scores, nullptr);
        if (part.bias) Common::add_bias(part, positions, s, block_begin, f.bias, f.scores);
      }
      // P = 2^(S - reference), with earlier sums rescaled where the reference moved
      const bool rescale = softmax(sight, block_begin, f);
      if (rescale)
        for (Index c = 0; c < part.dv; ++c)
          for (int v = 0; v < sight.vectors; ++v) {
            F x, factor;
            L::load(f.out + c * width + v * lanes, x);
            L::load(f.factor + v * lanes, factor);
            L::store(f.out + c * width + v * lanes, x * factor);
          }
      if (rescale && part.relative_values) relative.rescale(sight, f.factor, f.by_value);
      // P without what is dropped; the sums have all of it
      if (part.dropout_bound != 0)
        for (int i = 0; i < sight.segment_count; ++i)
          Common::drop(part, first, sight, sight.segments[i], block_begin, f.scores);
      // Ot += V^T P
      for (int i = 0; i < sight.segment_count; ++i) {
        Common::accumulate_columns(sight, sight.segments[i], block_begin, v_rows, part.dv, f.scores, f.out);
        if (part.relative_values) relative.collect(sight.segments[i], block_begin, f.scores, f.by_value);
      }
    }
    if (part.relative_values) {
      relative.straighten(sight, f.by_value);
      relative.add_columns(sight, part.relative_values, part.relative_values_stride, part.dv, f.by_value, f.out);
    }
    finish(part, first, sight, f);
  }

  /// S becomes P. Returns whether the reference of a lane that has seen keys before moved; `factor` then rescales what came
  /// before.
  static COTERIE_INLINE bool softmax(const Lookout& sight, int block_begin, const Scratch& f) {
    alignas(64) T block_max[width];
    for (int v = 0; v < sight.vectors; ++v) L::store(block_max + v * lanes, F{} + lowest);
    for (int i = 0; i < sight.segment_count; ++i) {
      const typename Lookout::Segment& s = sight.segments[i];
      for (int v = s.first; v < s.last; ++v) {
        F best;
        L::load(block_max + v * lanes, best);
        largest(sight, s, v, block_begin, f.scores, best);
        L::store(block_max + v * lanes, best);
      }
    }
    const bool grown = move_references(sight, block_max, f);
    for (int i = 0; i < sight.segment_count; ++i) {
      const typename Lookout::Segment& s = sight.segments[i];
      for (int v = s.first; v < s.last; ++v) {
        F origin, sum, x, p;
        L::load(f.reference + v * lanes, origin);
        origin = origin == F{} + lowest ? F{} : origin;  // exponents of a lane that has seen nothing yet stay finite
        L::load(f.sum + v * lanes, sum);
        T* at = f.scores + (s.begin - block_begin) * width + v * lanes;
        for (int j = s.begin; j < s.end; ++j, at += width) {
          L::load(at, x);
          L::exp2(x - origin, p);
          sum += p;
          L::store(at, p);
        }
        L::store(f.sum + v * lanes, sum);
      }
    }
    return grown;
  }

  /// best = the largest of it and a segment's scores of vector v; masked ones become the lowest number.
  static COTERIE_INLINE void largest(const Lookout& sight, const typename Lookout::Segment& s, int v, int block_begin,
                                     T* scores, F& best) {
    const auto score = [&](int key) __attribute__((always_inline)) {
      return scores + (key - block_begin) * width + v * lanes;
    };
    int begin = s.begin, end = s.end;
    if (s.masked) {
      sight.unmasked(s, v, begin, end);
      typename Lookout::Mask mask;
      sight.visible(v, mask);
      const auto hide = [&](int from, int until) __attribute__((always_inline)) {
        for (int j = from; j < until; ++j) {
          I sees;
          F x;
          mask.of(j, sees);
          L::load(score(j), x);
          x = sees < 0 ? x : F{} + lowest;
          L::store(score(j), x);
          best = x > best ? x : best;
        }
      };
      hide(s.begin, begin);
      hide(end, s.end);
    }
    F other = best, x;  // two at a time: each waits for the one before
    int j = begin;
    for (; j + 2 <= end; j += 2) {
      L::load(score(j), x);
      best = x > best ? x : best;
      L::load(score(j + 1), x);
      other = x > other ? x : other;
    }
    if (j < end) {
      L::load(score(j), x);
      best = x > best ? x : best;
    }
    best = other > best ? other : best;
  }

  /// Where a block's largest logit is above a lane's reference by more than there is room for, it becomes the reference.
  static COTERIE_INLINE bool move_references(const Lookout& sight, const T* block_max, const Scratch& f) {
    I above{}, grew{};
    for (int v = 0; v < sight.vectors; ++v) {
      F old, best;
      L::load(f.reference + v * lanes, old);
      L::load(block_max + v * lanes, best);
      const I sign = (I)(old + max_slack<T> - best);  // g++ 12 does not take comparisons here
      above |= sign;
      grew |= sign & (I)(F{} + lowest - old);
    }
    if (!L::any_negative(above)) return false;
    for (int v = 0; v < sight.vectors; ++v) {
      F old, best, sum, factor;
      L::load(f.reference + v * lanes, old);
      L::load(block_max + v * lanes, best);
      L::load(f.sum + v * lanes, sum);
      best = best > old + max_slack<T> ? best : old;
      // A lane that has seen nothing yet keeps its state of zeros.
      L::exp2(old - (best == F{} + lowest ? F{} : best), factor);
      L::store(f.reference + v * lanes, best);
      L::store(f.factor + v * lanes, factor);
      L::store(f.sum + v * lanes, sum * factor);
    }
    return L::any_negative(grew);
  }

  /// out = Ot / sum, lse = reference ln(2) + log(sum); zero and minus infinity where nothing is seen.
  static COTERIE_INLINE void finish(const AttentionArguments<T>& part, Index first, const Lookout& sight,
                                    const Scratch& f) {
    alignas(64) T inverse[width];
    alignas(64) T log_sum[width];
    for (int v = 0; v < sight.vectors; ++v) {
      F sum, y;
      L::load(f.sum + v * lanes, sum);
      L::log(sum, y);
      L::store(log_sum + v * lanes, y);
      I sees;
      sight.sees_any(v, sees);
      y = T(1) / sum;
      y = sees < 0 ? y : F{};
      L::store(inverse + v * lanes, y);
    }
    if (part.states.reference || part.states.inverse || part.states.lse)
      for (int l = 0; l < sight.count; ++l)
        Common::write_state(part, part.target(first + l), f.reference[l], log_sum[l], inverse[l], sight.sees_any(l));
    T* rows[width];
    for (int l = 0; l < sight.count; ++l) rows[l] = part.out + part.target(first + l) * part.out_stride;
    M::scatter_columns(f.out, inverse, sight.count, part.dv, rows);
  }
};

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
