// The forward tile: scores, online softmax, values.
//
//     S[key][lane]  = sum_d K[key][d] Qt[d][lane]      rows kernel: K's rows broadcast in place
//     online softmax down the keys, every lane on its own
//     Ot[d][lane]  += sum_key V[key][d] P[key][lane]   columns kernel: V's rows broadcast in place
//
// Relative keys join S before its soft cap, relative values join Ot at the end: see relative.hpp.
#pragma once

#include <limits>

#include "coterie/kernel/row.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

template <class T, class M>
struct Forward {
  using Common = Tile<T, M>;
  using L = typename M::L;
  using F = typename L::F;
  using I = typename L::I;
  using Integer = typename L::Integer;
  using Lookout = Sight<T, M>;
  using Distant = Relative<T, M>;
  static constexpr int lanes = L::count, width = M::width;
  static constexpr T lowest = std::numeric_limits<T>::lowest();

  struct Scratch {
    T *rows, *q, *scores, *out, *bias, *max, *sum, *factor, *by_key, *by_value;
  };

  static constexpr Index scratch_size(const PartSizes& sizes) {
    return tiles_size(sizes) + Common::gather_size(sizes.d, sizes.dv, sizes.keys);
  }
  static constexpr Index tiles_size(const PartSizes& sizes) {
    return std::max(tile_size(sizes), Row<T, M>::scratch_size(sizes.d, sizes.dv));
  }
  static constexpr Index tile_size(const PartSizes& sizes) {
    const Index d = padded(sizes.d), dv = padded(sizes.dv);
    return std::max(d, dv) * width + d * width + key_block * width + dv * width + padded(sizes.bias_count + 2 * width) +
           3 * width + 2 * Distant::buffer_size(sizes.relative_count) + Distant::scratch_size(sizes.relative_count);
  }

  static COTERIE_INLINE void run(const AttentionPart<T>& given, T* scratch) {
    AttentionPart<T> part = given;
    const PartSizes sizes = part.sizes();
    Common::gather(part, scratch + tiles_size(sizes));
    Scratch f;
    f.rows = scratch;
    f.q = f.rows + padded(std::max(part.d, part.dv)) * width;
    f.scores = f.q + padded(part.d) * width;
    f.out = f.scores + key_block * width;
    f.bias = f.out + padded(part.dv) * width;
    f.max = f.bias + padded(part.bias_count + 2 * width);
    f.sum = f.max + width;
    f.factor = f.sum + width;
    f.by_key = f.factor + width;
    f.by_value = f.by_key + Distant::buffer_size(part.relative_count);
    T* const rest = f.by_value + Distant::buffer_size(part.relative_count);
    COTERIE_ASSERT(rest + Distant::scratch_size(part.relative_count) == scratch + tile_size(sizes));
    // Few queries take the path of rows, but not with relative keys or values: a table is for many.
    const Index few = part.relative_count > 0 ? 0 : Row<T, M>::most;
    if (part.bias && part.entries > few) Common::pad_bias(part, f.bias);
    Positions<T, M> positions;
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

  static COTERIE_INLINE void tile(const AttentionPart<T>& part, Index first, int count, const Scratch& f,
                                  Positions<T, M>& positions, Distant& relative) {
    Lookout sight;
    sight.look(part, first, count);
    const auto q_row = [&](int l) __attribute__((always_inline)) { return part.q.row(part.rows[first + l]); };
    const auto q_factor = [&](int) __attribute__((always_inline)) { return part.scale * log2_e<T>; };
    Common::pack(sight, part.d, f.rows, f.q, q_row, q_factor);
    for (int v = 0; v < sight.vectors; ++v) {
      L::store(f.max + v * lanes, F{} + lowest);
      L::store(f.sum + v * lanes, F{});
    }
    std::memset(f.out, 0, static_cast<std::size_t>(padded(part.dv) * width) * sizeof(T));
    if (part.bias || part.relative_count > 0) positions.look(part, first, sight);
    if (part.relative_count > 0) relative.look(sight);
    if (part.relative_keys)
      relative.products(sight, part.relative_keys, part.relative_keys_stride, part.d, f.q, f.by_key);
    if (part.relative_values) relative.clear(f.by_value);

    typename Common::Following following(part, first);
    const T* k_rows[key_block];
    const T* v_rows[key_block];
    for (int key = sight.next_key(0); key != Lookout::none;
         key = sight.next_key(key / key_block * key_block + key_block)) {
      const int block_begin = key / key_block * key_block;
      sight.cut(block_begin);
      if (part.bias || part.relative_count > 0) positions.look_at_keys(part, sight, block_begin);
      if (part.relative_count > 0) relative.look_at_keys(sight, block_begin);
      for (int j = sight.low; j < sight.high; ++j) part.locate(j, k_rows[j - block_begin], v_rows[j - block_begin]);
      following.fetch();
      // S = K Qt
      for (int i = 0; i < sight.segment_count; ++i) {
        const typename Lookout::Segment& s = sight.segments[i];
        M::scores(k_rows + (s.begin - block_begin), s.end - s.begin, part.d, f.q + s.first * lanes,
                  f.scores + (s.begin - block_begin) * width + s.first * lanes, s.last - s.first);
        if (part.relative_keys) relative.add(s, block_begin, f.by_key, f.scores);
        if (part.soft_cap != 0) Common::cap_scores(part, s, block_begin, f.scores, nullptr);
        if (part.bias) Common::add_bias(part, positions, s, block_begin, f.bias, f.scores);
      }
      // P = 2^(S - max), with earlier sums rescaled where the maximum grew
      following.fetch();
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
      following.fetch();
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

  /// Returns whether any lane's maximum grew after its first block; `factor` then rescales what came before.
  static COTERIE_INLINE bool softmax(const Lookout& sight, int block_begin, const Scratch& f) {
    alignas(64) T block_max[width];
    for (int v = 0; v < sight.vectors; ++v) L::store(block_max + v * lanes, F{} + lowest);
    for (int i = 0; i < sight.segment_count; ++i) {
      const typename Lookout::Segment& s = sight.segments[i];
      for (int v = s.first; v < s.last; ++v) {
        F best, x;
        L::load(block_max + v * lanes, best);
        T* at = f.scores + (s.begin - block_begin) * width + v * lanes;
        if (s.masked) {
          for (int j = s.begin; j < s.end; ++j, at += width) {
            I mask;
            sight.visible(v, j, mask);
            L::load(at, x);
            x = mask ? x : F{} + lowest;
            L::store(at, x);
            best = x > best ? x : best;
          }
        } else {
          for (int j = s.begin; j < s.end; ++j, at += width) {
            L::load(at, x);
            best = x > best ? x : best;
          }
        }
        L::store(block_max + v * lanes, best);
      }
    }
    Integer grown = 0;
    for (int v = 0; v < sight.vectors; ++v) {
      F old, best, sum, factor;
      L::load(f.max + v * lanes, old);
      L::load(block_max + v * lanes, best);
      L::load(f.sum + v * lanes, sum);
      best = best > old ? best : old;
      // A lane that has seen nothing yet keeps its state of zeros; its exponents stay finite.
      const F safe = best == F{} + lowest ? F{} : best;
      L::exp2(old - safe, factor);
      const I changed = (best > old) & (old > F{} + lowest);
      for (int l = 0; l < lanes; ++l) grown |= changed[l];
      factor = changed ? factor : F{} + T(1);
      L::store(f.max + v * lanes, best);
      L::store(block_max + v * lanes, safe);
      L::store(f.factor + v * lanes, factor);
      L::store(f.sum + v * lanes, sum * factor);
    }
    for (int i = 0; i < sight.segment_count; ++i) {
      const typename Lookout::Segment& s = sight.segments[i];
      for (int v = s.first; v < s.last; ++v) {
        F best, sum, x, p;
        L::load(block_max + v * lanes, best);
        L::load(f.sum + v * lanes, sum);
        T* at = f.scores + (s.begin - block_begin) * width + v * lanes;
        for (int j = s.begin; j < s.end; ++j, at += width) {
          L::load(at, x);
          L::exp2(x - best, p);
          sum += p;
          L::store(at, p);
        }
        L::store(f.sum + v * lanes, sum);
      }
    }
    return grown != 0;
  }

  /// out = Ot / sum, lse = max ln(2) + log(sum); zero and minus infinity where nothing is seen.
  static COTERIE_INLINE void finish(const AttentionPart<T>& part, Index first, const Lookout& sight, const Scratch& f) {
    alignas(64) T inverse[width];
    alignas(64) T log_sum[width];
    for (int v = 0; v < sight.vectors; ++v) {
      F sum, y;
      L::load(f.sum + v * lanes, sum);
      L::log(sum, y);
      L::store(log_sum + v * lanes, y);
    }
    for (int l = 0; l < sight.count; ++l) {
      const bool sees = sight.sees_any(l);
      inverse[l] = sees ? T(1) / f.sum[l] : T(0);
      Common::write_state(part, part.target(first + l), f.max[l], log_sum[l], inverse[l], sees);
    }
    const Index stride = padded(part.dv);
    M::transpose_out(f.out, sight.vectors, part.dv, f.rows, stride);
    for (int l = 0; l < sight.count; ++l)
      Common::scale_row(f.rows + l * stride, inverse[l], part.dv, part.out + part.target(first + l) * part.out_stride);
  }
};

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
