// The backward tile: probabilities again from each row's reference and sum, then four products.
//
//     S = K Qt, P = 2^(S - reference) / sum           undoes the forward tile line by line:
//     dP[key][lane]  = sum_c V[key][c] dOt[c][lane]    of Ot += V P for P
//     dS             = P (dP - delta) ln(2)            of the softmax, for logits to base 2
//     dQt[d][lane]  += sum_key K[key][d] dS[key][lane] of S = K Qt for Q
//     dV[key][c]    += sum_lane P[key][lane] dO[lane][c]
//     dK[key][d]    += sum_lane dS[key][lane] Q[lane][d]
//
// Relative keys and values (see relative.hpp) add to S and dP; dS and P by distance, summed over the keys, give their gradients.
#pragma once

#include <algorithm>
#include <limits>

#include "coterie/kernel/tile.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

template <class T, class M>
struct Backward {
  using Common = Tile<T, M>;
  using L = typename M::L;
  using F = typename L::F;
  using I = typename L::I;
  using Lookout = Sight<T, M>;
  using Distant = Relative<T, M>;
  static constexpr int lanes = L::count, width = M::width;

  struct Scratch {
    T *q_rows, *q, *d_out_rows, *d_out, *scores, *d_scores, *slope, *d_q, *bias, *d_bias, *reference, *inverse, *delta;
    T *by_key, *by_value, *d_by_key, *d_by_value, *table_rows;
  };

  static constexpr Index scratch_size(const PartSizes& sizes) {
    return tile_size(sizes) + Common::gather_size(sizes.d, sizes.dv, sizes.keys);
  }
  static constexpr Index tile_size(const PartSizes& sizes) {
    const Index d = padded(sizes.d), dv = padded(sizes.dv), relative = sizes.relative_count;
    return 3 * d * width + 2 * dv * width + 3 * key_block * width + 2 * padded(sizes.bias_count + 2 * width) +
           3 * width + 4 * Distant::buffer_size(relative) + (relative > 0 ? key_block * std::max(d, dv) : 0) +
           Distant::scratch_size(relative);
  }

  static COTERIE_INLINE void run(const AttentionArguments<T>& given, const AttentionGradientArguments<T>& gradients,
                                 T* scratch) {
    AttentionArguments<T> part = given;
    const PartSizes sizes = part.sizes();
    Common::gather(part, std::numeric_limits<Index>::max(), scratch + tile_size(sizes));
    Scratch b;
    b.q_rows = scratch;
    b.q = b.q_rows + padded(part.d) * width;
    b.d_q = b.q + padded(part.d) * width;
    b.d_out_rows = b.d_q + padded(part.d) * width;
    b.d_out = b.d_out_rows + padded(part.dv) * width;
    b.scores = b.d_out + padded(part.dv) * width;
    b.d_scores = b.scores + key_block * width;
    b.slope = b.d_scores + key_block * width;
    b.bias = b.slope + key_block * width;
    b.d_bias = b.bias + padded(part.bias_count + 2 * width);
    b.reference = b.d_bias + padded(part.bias_count + 2 * width);
    b.inverse = b.reference + width;
    b.delta = b.inverse + width;
    const Index buffer = Distant::buffer_size(part.relative_count);
    b.by_key = b.delta + width;
    b.by_value = b.by_key + buffer;
    b.d_by_key = b.by_value + buffer;
    b.d_by_value = b.d_by_key + buffer;
    b.table_rows = b.d_by_value + buffer;
    T* const rest = b.table_rows + (part.relative_count > 0 ? key_block * padded(std::max(part.d, part.dv)) : 0);
    COTERIE_ASSERT(rest + Distant::scratch_size(part.relative_count) == scratch + tile_size(sizes));
    if (part.bias) {
      Common::pad_bias(part, b.bias);
      std::fill_n(b.d_bias, part.bias_count + 2 * width, T(0));
    }
    TilePositions<T, M> positions;
    Distant relative;
    relative.begin(part, positions, rest);
    for (Index first = 0; first < part.entries; first += width)
      tile(part, gradients, first, static_cast<int>(std::min<Index>(width, part.entries - first)), b, positions,
           relative);
    if (gradients.d_bias)
      for (Index i = 0; i < part.bias_count + 2 * width; ++i)
        gradients.d_bias[std::clamp<Index>(i - width, 0, part.bias_count - 1)] += b.d_bias[i] * log2_e<T>;
  }

  static COTERIE_INLINE void tile(const AttentionArguments<T>& part, const AttentionGradientArguments<T>& gradients,
                                  Index first, int count, const Scratch& b, TilePositions<T, M>& positions,
                                  Distant& relative) {
    Lookout sight;
    sight.look(part, first, count);
    const auto q_row = [&](int l) __attribute__((always_inline)) { return part.q.row(part.rows[first + l]); };
    const auto q_factor = [&](int) __attribute__((always_inline)) { return part.scale * log2_e<T>; };
    const auto d_row = [&](int l) __attribute__((always_inline)) {
      return gradients.d_out + part.rows[first + l] * gradients.d_out_stride;
    };
    const auto d_factor = [&](int l) __attribute__((always_inline)) {
      return gradients.weight ? gradients.weight[first + l] : T(1);
    };
    const auto d_q_row = [&](Index entry) __attribute__((always_inline)) {
      return gradients.d_q + (gradients.by_entry ? entry : Index(part.rows[entry])) * gradients.d_q_stride;
    };
    Common::pack(sight, part.d, b.q_rows, b.q, q_row, q_factor);
    Common::pack(sight, part.dv, b.d_out_rows, b.d_out, d_row, d_factor);
    Common::clear(sight, part.d, b.d_q);
    for (int l = 0; l < sight.vectors * lanes; ++l) {
      // Lanes without an entry: probabilities of zero, whatever a bias adds.
      b.reference[l] = std::numeric_limits<T>::max();
      b.inverse[l] = b.delta[l] = 0;
      if (l >= count || !sight.sees_any(l)) continue;
      // delta = sum_c d_out[c] out[c] - d_lse
      const Index target = part.target(first + l);
      const T* out = part.out + target * part.out_stride;
      const T* d_out = b.d_out_rows + l * padded(part.dv);
      const T d_lse = gradients.d_lse ? gradients.d_lse[part.rows[first + l] * gradients.d_lse_stride] : T(0);
      b.delta[l] = dot(d_out, out, part.dv) - d_lse;
      b.reference[l] = part.states.reference[target * part.states.stride];
      b.inverse[l] = part.states.inverse[target * part.states.stride];
    }
    if (part.bias || part.relative_count > 0) positions.look(part, first, sight);
    if (part.relative_count > 0) relative.look(sight);
    if (part.relative_keys) {
      relative.products(sight, part.relative_keys, part.relative_keys_stride, part.d, b.q, b.by_key);
      relative.clear(b.d_by_key);
    }
    if (part.relative_values)
      relative.products(sight, part.relative_values, part.relative_values_stride, part.dv, b.d_out, b.by_value);
    if (gradients.d_relative_values) relative.clear(b.d_by_value);

    typename Common::Following following(part, first, 3 * sight.blocks());
    const auto fetch_some = [&]() __attribute__((always_inline)) {
      following.fetch([&](const AttentionArguments<T>& later, Index entry) __attribute__((always_inline)) {
        L::fetch(gradients.d_out + later.rows[entry] * gradients.d_out_stride, later.dv);
        if (!gradients.by_entry) L::fetch(gradients.d_q + later.rows[entry] * gradients.d_q_stride, later.d);
      });
    };
    const T* k_rows[key_block];
    const T* v_rows[key_block];
    const T* p_rows[key_block];
    for (int block_begin = sight.first_block(); block_begin != Lookout::none;
         block_begin = sight.next_block(block_begin)) {
      sight.cut_by_keys(block_begin);
      if (part.bias || part.relative_count > 0) positions.look_at_keys(part, sight, block_begin);
      if (part.relative_count > 0) relative.look_at_keys(sight, block_begin);
      for (int j = sight.low; j < sight.high; ++j) part.locate(j, k_rows[j - block_begin], v_rows[j - block_begin]);
      for (int i = 0; i < sight.segment_count; ++i) {
        const typename Lookout::Segment& s = sight.segments[i];
        // S = K Qt, then dP = V dOt
        for (int pass = 0; pass < 2; ++pass) {
          const T* const* rows = pass ? v_rows : k_rows;
          T* to = pass ? b.d_scores : b.scores;
          M::scores(rows + (s.begin - block_begin), s.end - s.begin, pass ? part.dv : part.d,
                    (pass ? b.d_out : b.q) + s.first * lanes, to + (s.begin - block_begin) * width + s.first * lanes,
                    s.last - s.first);
        }
        if (part.relative_keys) relative.add(s, block_begin, b.by_key, b.scores);
        if (part.relative_values) relative.add(s, block_begin, b.by_value, b.d_scores);
        if (part.soft_cap != 0) Common::cap_scores(part, s, block_begin, b.scores, b.slope);
        if (part.bias) Common::add_bias(part, positions, s, block_begin, b.bias, b.scores);
        fetch_some();
        if (part.dropout_bound != 0) Common::drop(part, first, sight, s, block_begin, b.d_scores);
        probabilities(sight, s, block_begin, b);
        if (part.dropout_bound != 0) Common::drop(part, first, sight, s, block_begin, b.scores);
        if (gradients.d_bias) Common::add_bias_gradient(part, positions, s, block_begin, b.d_scores, b.d_bias);
        if (part.soft_cap != 0) uncap(sight, s, block_begin, b);
        if (part.relative_keys) relative.collect(s, block_begin, b.d_scores, b.d_by_key);
        if (gradients.d_relative_values) relative.collect(s, block_begin, b.scores, b.d_by_value);
        fetch_some();
        // dQt += K^T dS
        Common::accumulate_columns(sight, s, block_begin, k_rows, part.d, b.d_scores, b.d_q);
        fetch_some();
        // dV += P dO, then dK += dS Q
        const Index row = partial_row(gradients, s.begin);
        for (int pass = 0; pass < 2; ++pass) {
          const T* p = pass ? b.d_scores : b.scores;
          for (int j = s.begin - block_begin; j < s.end - block_begin; ++j) p_rows[j] = p + j * width + s.first * lanes;
          const Index columns = padded(pass ? part.d : part.dv);
          accumulate_rows(sight, s, block_begin, p_rows, (pass ? b.q_rows : b.d_out_rows) + s.first * lanes * columns,
                          columns, (pass ? gradients.d_k : gradients.d_v) + row * columns);
        }
      }
    }

    // dQt += rK^T dR, d_rK += dR Q, d_rV += A dO
    if (part.relative_keys) {
      relative.straighten(sight, b.d_by_key);
      relative.add_columns(sight, part.relative_keys, part.relative_keys_stride, part.d, b.d_by_key, b.d_q);
    }
    if (gradients.d_relative_keys)
      relative.add_rows(sight, b.d_by_key, b.q_rows, padded(part.d), b.table_rows, gradients.d_relative_keys);
    if (gradients.d_relative_values) {
      relative.straighten(sight, b.d_by_value);
      relative.add_rows(sight, b.d_by_value, b.d_out_rows, padded(part.dv), b.table_rows, gradients.d_relative_values);
    }

    // d_q += scale * dQ, d_scale += q . dQ
    M::transpose_out(b.d_q, sight.vectors, part.d, b.q_rows, padded(part.d));
    for (int l = 0; l < count; ++l) {
      const T* from = b.q_rows + l * padded(part.d);
      Common::add_scaled(from, q_factor(l), part.d, d_q_row(first + l));
      if (gradients.d_scale && sight.sees_any(l)) *gradients.d_scale += dot(from, q_row(l), part.d) * log2_e<T>;
    }
  }

  static COTERIE_INLINE T dot(const T* a, const T* b, Index columns) {
    F sum{}, x, y;
    Index c = 0;
    for (; c + lanes <= columns; c += lanes) {
      L::load(a + c, x);
      L::load(b + c, y);
      L::add_product(x, y, sum);
    }
    T result = 0;
    for (int l = 0; l < lanes; ++l) result += sum[l];
    for (; c < columns; ++c) result += a[c] * b[c];
    return result;
  }

  static COTERIE_INLINE Index partial_row(const AttentionGradientArguments<T>& gradients, int key) {
    const PartialRange* range = std::upper_bound(gradients.ranges, gradients.ranges + gradients.range_count, key,
                                                 [](int k, const PartialRange& r) { return k < r.end; });
    COTERIE_ASSERT(range < gradients.ranges + gradients.range_count && key >= range->begin);
    return range->row + key - range->begin;
  }

  /// P = 2^(S - reference) / sum, dS = P (dP - delta) ln(2); both zero where masked.
  static COTERIE_INLINE void probabilities(const Lookout& sight, const typename Lookout::Segment& s, int block_begin,
                                           const Scratch& b) {
    for (int v = s.first; v < s.last; ++v) {
      F reference, inverse, delta;
      L::load(b.reference + v * lanes, reference);
      L::load(b.inverse + v * lanes, inverse);
      L::load(b.delta + v * lanes, delta);
      typename Lookout::Mask mask;
      const bool masked = s.masked || sight.partial(v);
      if (masked) sight.used(v, mask);
      for (int j = s.begin; j < s.end; ++j) {
        const Index at = (j - block_begin) * width + v * lanes;
        F x, p, d_p;
        L::load(b.scores + at, x);
        L::load(b.d_scores + at, d_p);
        L::exp2(x - reference, p);
        p *= inverse;
        F d_s = p * ((d_p - delta) * ln_2<T>);
        if (masked) {
          I sees;
          mask.of(j, sees);
          p = sees < 0 ? p : F{};
          d_s = sees < 0 ? d_s : F{};
        }
        L::store(b.scores + at, p);
        L::store(b.d_scores + at, d_s);
      }
    }
  }

  /// Undoes cap_scores: dS *= slope; zero where masked, whatever the slope is.
  static COTERIE_INLINE void uncap(const Lookout& sight, const typename Lookout::Segment& s, int block_begin,
                                   const Scratch& b) {
    for (int v = s.first; v < s.last; ++v) {
      typename Lookout::Mask mask;
      const bool masked = s.masked || sight.partial(v);
      if (masked) sight.used(v, mask);
      for (int key = s.begin; key < s.end; ++key) {
        const Index at = (key - block_begin) * width + v * lanes;
        F d_s, slope;
        L::load(b.d_scores + at, d_s);
        L::load(b.slope + at, slope);
        d_s *= slope;
        if (masked) {
          I sees;
          mask.of(key, sees);
          d_s = sees < 0 ? d_s : F{};
        }
        L::store(b.d_scores + at, d_s);
      }
    }
  }

  /// to[key][c] += sum over the segment's lanes of p[key][lane] x[lane][c].
  static COTERIE_INLINE void accumulate_rows(const Lookout& sight, const typename Lookout::Segment& s, int block_begin,
                                             const T* const* p, const T* x, Index columns, T* to) {
    const int keys = s.end - s.begin, depth = (s.last - s.first) * lanes;
    const Index from = M::rows(p + (s.begin - block_begin), keys, depth, x, columns, to, s.masked);
    if (from == columns) return;
    for (Index c = from; c < columns; c += lanes)
      for (int j = 0; j < keys; ++j) {
        F sum, y;
        L::load(to + j * columns + c, sum);
        for (int l = 0; l < depth; ++l) {
          if (!sight.sees(s.first * lanes + l, s.begin + j)) continue;
          L::load(x + l * columns + c, y);
          L::add_product(p[s.begin - block_begin + j][l], y, sum);
        }
        L::store(to + j * columns + c, sum);
      }
  }
};

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
