// The backward tile: probabilities again from each row's reference and sum, then four products.
//
//     S = K Qt, P = 2^(S - reference) / sum           undoes the forward tile line by line:
//     dP[key][lane]  = sum_c V[key][c] dOt[c][lane]    of Ot += V P for P
//     dS             = P (dP - delta) ln(2)            of the softmax, for logits to base 2
//     dQt[d][lane]  += sum_key K[key][d] dS[key][lane] of S = K Qt for Q
//     dV[key][c]    += sum_lane P[key][lane] dO[lane][c]
//     dK[key][d]    += sum_lane dS[key][lane] Q[lane][d]
//
// Relative keys and values (see relative.hpp) add to S and dP; dS and P by distance, summed over the keys, give their
// gradients.
#pragma once

#include <algorithm>
#include <limits>

#include "coterie/kernel/dispatch.hpp"
#include "coterie/kernel/tile.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

template <class T, class M>
struct Backward {
  using L = typename M::L;
  using F = typename L::F;
  using Ints = typename L::Ints;
  static constexpr int lanes = L::count, width = M::width;

  struct Scratch {
    T *q_rows, *q, *d_out_rows, *d_out, *scores, *d_scores, *slope, *d_q, *bias, *d_bias, *reference, *inverse, *delta;
    T *by_key, *by_value, *d_by_key, *d_by_value, *table_rows;
  };

  static constexpr Index scratch_size(const PartSizes& sizes) {
    return tile_size(sizes) + Tile<T, M>::gather_size(sizes.d, sizes.dv, sizes.keys);
  }
  static constexpr Index tile_size(const PartSizes& sizes) {
    const Index d = padded(sizes.d), dv = padded(sizes.dv), relative = sizes.relative_count;
    return 3 * d * width + 2 * dv * width + 3 * key_block * width + 2 * padded(sizes.bias_count + 2 * width) +
           3 * width + 4 * Relative<T, M>::buffer_size(relative) + (relative > 0 ? key_block * (std::max)(d, dv) : 0) +
           Relative<T, M>::scratch_size(relative);
  }

  static COTERIE_INLINE void run(const AttentionArguments<T>& given, const AttentionGradientArguments<T>& gradients,
                                 T* scratch) {
    AttentionArguments<T> arguments = given;
    const PartSizes sizes = arguments.sizes();
    Tile<T, M>::gather(arguments, (std::numeric_limits<Index>::max)(), scratch + tile_size(sizes));
    Scratch b;
    b.q_rows = scratch;
    b.q = b.q_rows + padded(arguments.d) * width;
    b.d_q = b.q + padded(arguments.d) * width;
    b.d_out_rows = b.d_q + padded(arguments.d) * width;
    b.d_out = b.d_out_rows + padded(arguments.dv) * width;
    b.scores = b.d_out + padded(arguments.dv) * width;
    b.d_scores = b.scores + key_block * width;
    b.slope = b.d_scores + key_block * width;
    b.bias = b.slope + key_block * width;
    b.d_bias = b.bias + padded(arguments.bias_count + 2 * width);
    b.reference = b.d_bias + padded(arguments.bias_count + 2 * width);
    b.inverse = b.reference + width;
    b.delta = b.inverse + width;
    const Index buffer = Relative<T, M>::buffer_size(arguments.relative_count);
    b.by_key = b.delta + width;
    b.by_value = b.by_key + buffer;
    b.d_by_key = b.by_value + buffer;
    b.d_by_value = b.d_by_key + buffer;
    b.table_rows = b.d_by_value + buffer;
    T* const rest =
        b.table_rows + (arguments.relative_count > 0 ? key_block * padded((std::max)(arguments.d, arguments.dv)) : 0);
    COTERIE_ASSERT((rest + Relative<T, M>::scratch_size(arguments.relative_count) == scratch + tile_size(sizes)));
    if (arguments.bias) {
      Tile<T, M>::pad_bias(arguments, b.bias);
      std::fill_n(b.d_bias, arguments.bias_count + 2 * width, T(0));
    }
    TilePositions<T, M> positions;
    Relative<T, M> relative;
    relative.begin(arguments, positions, rest);
    for (Index first = 0; first < arguments.entries; first += width)
      tile(arguments, gradients, first, static_cast<int>(std::min<Index>(width, arguments.entries - first)), b,
           positions, relative);
    if (gradients.d_bias)
      for (Index i = 0; i < arguments.bias_count + 2 * width; ++i)
        gradients.d_bias[std::clamp<Index>(i - width, 0, arguments.bias_count - 1)] += b.d_bias[i] * log2_e<T>;
  }

  static COTERIE_INLINE void tile(const AttentionArguments<T>& arguments,
                                  const AttentionGradientArguments<T>& gradients, Index first, int count,
                                  const Scratch& b, TilePositions<T, M>& positions, Relative<T, M>& relative) {
    Visibility<T, M> visibility;
    visibility.take(arguments, first, count);
    const auto q_row = [&](int l) __attribute__((always_inline)) { return arguments.q.row(arguments.rows[first + l]); };
    const auto q_factor = [&](int) __attribute__((always_inline)) { return arguments.scale * log2_e<T>; };
    const auto d_row = [&](int l) __attribute__((always_inline)) {
      return gradients.d_out + arguments.rows[first + l] * gradients.d_out_stride;
    };
    const auto d_factor = [&](int l) __attribute__((always_inline)) {
      return gradients.weight ? gradients.weight[first + l] : T(1);
    };
    const auto d_q_row = [&](Index entry) __attribute__((always_inline)) {
      return gradients.d_q + (gradients.by_entry ? entry : Index(arguments.rows[entry])) * gradients.d_q_stride;
    };
    Tile<T, M>::pack(visibility, arguments.d, b.q_rows, b.q, q_row, q_factor);
    Tile<T, M>::pack(visibility, arguments.dv, b.d_out_rows, b.d_out, d_row, d_factor);
    Tile<T, M>::clear(visibility, arguments.d, b.d_q);
    for (int l = 0; l < visibility.vectors * lanes; ++l) {
      // Lanes without an entry: probabilities of zero, whatever a bias adds.
      b.reference[l] = (std::numeric_limits<T>::max)();
      b.inverse[l] = b.delta[l] = 0;
      if (l >= count || !visibility.sees_any(l)) continue;
      // delta = sum_c d_out[c] out[c] - d_lse
      const Index target = arguments.target(first + l);
      const T* out = arguments.out + target * arguments.out_stride;
      const T* d_out = b.d_out_rows + l * padded(arguments.dv);
      const T d_lse = gradients.d_lse ? gradients.d_lse[arguments.rows[first + l] * gradients.d_lse_stride] : T(0);
      b.delta[l] = dot(d_out, out, arguments.dv) - d_lse;
      b.reference[l] = arguments.states.reference[target * arguments.states.stride];
      b.inverse[l] = arguments.states.inverse[target * arguments.states.stride];
    }
    if (arguments.bias || arguments.relative_count > 0) positions.take(arguments, first, visibility);
    if (arguments.relative_count > 0) relative.take(visibility);
    if (arguments.relative_keys) {
      relative.products(visibility, arguments.relative_keys, arguments.relative_keys_stride, arguments.d, b.q,
                        b.by_key);
      relative.clear(b.d_by_key);
    }
    if (arguments.relative_values)
      relative.products(visibility, arguments.relative_values, arguments.relative_values_stride, arguments.dv, b.d_out,
                        b.by_value);
    if (gradients.d_relative_values) relative.clear(b.d_by_value);

    typename Tile<T, M>::Following following(arguments, first, 3 * visibility.blocks());
    const auto fetch_some = [&]() __attribute__((always_inline)) {
      following.fetch([&](const AttentionArguments<T>& later, Index entry) __attribute__((always_inline)) {
        L::fetch(gradients.d_out + later.rows[entry] * gradients.d_out_stride, later.dv);
        if (!gradients.by_entry) L::fetch(gradients.d_q + later.rows[entry] * gradients.d_q_stride, later.d);
      });
    };
    const T* k_rows[key_block];
    const T* v_rows[key_block];
    const T* p_rows[key_block];
    for (int block_begin = visibility.first_block(); block_begin != Visibility<T, M>::none;
         block_begin = visibility.next_block(block_begin)) {
      visibility.cut_by_keys(block_begin);
      if (arguments.bias || arguments.relative_count > 0) positions.turn_to_block(arguments, visibility, block_begin);
      if (arguments.relative_count > 0) relative.turn_to_block(visibility, block_begin);
      for (int j = visibility.low; j < visibility.high; ++j)
        arguments.locate(j, k_rows[j - block_begin], v_rows[j - block_begin]);
      for (int i = 0; i < visibility.segment_count; ++i) {
        const KeySegment& s = visibility.segments[i];
        // S = K Qt, then dP = V dOt
        for (int pass = 0; pass < 2; ++pass) {
          const T* const* rows = pass ? v_rows : k_rows;
          T* to = pass ? b.d_scores : b.scores;
          M::scores(rows + (s.begin - block_begin), s.end - s.begin, pass ? arguments.dv : arguments.d,
                    (pass ? b.d_out : b.q) + s.first * lanes, to + (s.begin - block_begin) * width + s.first * lanes,
                    s.last - s.first);
        }
        if (arguments.relative_keys) relative.add(s, block_begin, b.by_key, b.scores);
        if (arguments.relative_values) relative.add(s, block_begin, b.by_value, b.d_scores);
        if (arguments.soft_cap != 0) Tile<T, M>::cap_scores(arguments, s, block_begin, b.scores, b.slope);
        if (arguments.bias) Tile<T, M>::add_bias(arguments, positions, s, block_begin, b.bias, b.scores);
        fetch_some();
        if (arguments.dropout_bound != 0) Tile<T, M>::drop(arguments, first, visibility, s, block_begin, b.d_scores);
        probabilities(visibility, s, block_begin, b);
        if (arguments.dropout_bound != 0) Tile<T, M>::drop(arguments, first, visibility, s, block_begin, b.scores);
        if (gradients.d_bias) Tile<T, M>::add_bias_gradient(arguments, positions, s, block_begin, b.d_scores, b.d_bias);
        if (arguments.soft_cap != 0) uncap(visibility, s, block_begin, b);
        if (arguments.relative_keys) relative.collect(s, block_begin, b.d_scores, b.d_by_key);
        if (gradients.d_relative_values) relative.collect(s, block_begin, b.scores, b.d_by_value);
        fetch_some();
        // dQt += K^T dS
        Tile<T, M>::accumulate_columns(visibility, s, block_begin, k_rows, arguments.d, b.d_scores, b.d_q);
        fetch_some();
        // dV += P dO, then dK += dS Q
        const Index row = partial_row(gradients, s.begin);
        for (int pass = 0; pass < 2; ++pass) {
          const T* p = pass ? b.d_scores : b.scores;
          for (int j = s.begin - block_begin; j < s.end - block_begin; ++j) p_rows[j] = p + j * width + s.first * lanes;
          const Index columns = padded(pass ? arguments.d : arguments.dv);
          accumulate_rows(visibility, s, block_begin, p_rows,
                          (pass ? b.q_rows : b.d_out_rows) + s.first * lanes * columns, columns,
                          (pass ? gradients.d_k : gradients.d_v) + row * columns);
        }
      }
    }

    // dQt += rK^T dR, d_rK += dR Q, d_rV += A dO
    if (arguments.relative_keys) {
      relative.straighten(visibility, b.d_by_key);
      relative.add_columns(visibility, arguments.relative_keys, arguments.relative_keys_stride, arguments.d, b.d_by_key,
                           b.d_q);
    }
    if (gradients.d_relative_keys)
      relative.add_rows(visibility, b.d_by_key, b.q_rows, padded(arguments.d), b.table_rows, gradients.d_relative_keys);
    if (gradients.d_relative_values) {
      relative.straighten(visibility, b.d_by_value);
      relative.add_rows(visibility, b.d_by_value, b.d_out_rows, padded(arguments.dv), b.table_rows,
                        gradients.d_relative_values);
    }

    // d_q += scale * dQ, d_scale += q . dQ
    M::transpose_out(b.d_q, visibility.vectors, arguments.d, b.q_rows, padded(arguments.d));
    for (int l = 0; l < count; ++l) {
      const T* from = b.q_rows + l * padded(arguments.d);
      Tile<T, M>::add_scaled(from, q_factor(l), arguments.d, d_q_row(first + l));
      if (gradients.d_scale && visibility.sees_any(l))
        *gradients.d_scale += dot(from, q_row(l), arguments.d) * log2_e<T>;
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
  static COTERIE_INLINE void probabilities(const Visibility<T, M>& visibility, const KeySegment& s, int block_begin,
                                           const Scratch& b) {
    for (int v = s.first; v < s.last; ++v) {
      F reference, inverse, delta;
      L::load(b.reference + v * lanes, reference);
      L::load(b.inverse + v * lanes, inverse);
      L::load(b.delta + v * lanes, delta);
      typename Visibility<T, M>::Mask mask;
      const bool masked = s.masked || visibility.partial(v);
      if (masked) visibility.used(v, mask);
      for (int j = s.begin; j < s.end; ++j) {
        const Index at = (j - block_begin) * width + v * lanes;
        F x, p, d_p;
        L::load(b.scores + at, x);
        L::load(b.d_scores + at, d_p);
        L::exp2(x - reference, p);
        p *= inverse;
        F d_s = p * ((d_p - delta) * ln_2<T>);
        if (masked) {
          Ints sees;
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
  static COTERIE_INLINE void uncap(const Visibility<T, M>& visibility, const KeySegment& s, int block_begin,
                                   const Scratch& b) {
    for (int v = s.first; v < s.last; ++v) {
      typename Visibility<T, M>::Mask mask;
      const bool masked = s.masked || visibility.partial(v);
      if (masked) visibility.used(v, mask);
      for (int key = s.begin; key < s.end; ++key) {
        const Index at = (key - block_begin) * width + v * lanes;
        F d_s, slope;
        L::load(b.d_scores + at, d_s);
        L::load(b.slope + at, slope);
        d_s *= slope;
        if (masked) {
          Ints sees;
          mask.of(key, sees);
          d_s = sees < 0 ? d_s : F{};
        }
        L::store(b.d_scores + at, d_s);
      }
    }
  }

  /// to[key][c] += sum over the segment's lanes of p[key][lane] x[lane][c].
  static COTERIE_INLINE void accumulate_rows(const Visibility<T, M>& visibility, const KeySegment& s, int block_begin,
                                             const T* const* p, const T* x, Index columns, T* to) {
    const int keys = s.end - s.begin, depth = (s.last - s.first) * lanes;
    const Index from = M::rows(p + (s.begin - block_begin), keys, depth, x, columns, to, s.masked);
    if (from == columns) return;
    for (Index c = from; c < columns; c += lanes)
      for (int j = 0; j < keys; ++j) {
        F sum, y;
        L::load(to + j * columns + c, sum);
        for (int l = 0; l < depth; ++l) {
          if (!visibility.sees(s.first * lanes + l, s.begin + j)) continue;
          L::load(x + l * columns + c, y);
          L::add_product(p[s.begin - block_begin + j][l], y, sum);
        }
        L::store(to + j * columns + c, sum);
      }
  }
};

COTERIE_KERNEL(BackwardKernel, Backward, run,
               (const AttentionArguments<T>& arguments, const AttentionGradientArguments<T>& gradients, T* scratch),
               (arguments, gradients, scratch))
COTERIE_KERNEL(AddRowsKernel, Tile, add_rows, (const RowSums<T>& sums), (sums))

/// What a backward pass calls.
template <class T>
struct BackwardFunctions {
  void (*backward)(const AttentionArguments<T>&, const AttentionGradientArguments<T>&, T* scratch) = nullptr;
  Index (*backward_scratch)(const PartSizes&) = nullptr;  // numbers of scratch memory
  void (*add_rows)(const RowSums<T>&) = nullptr;
};

template <class T>
BackwardFunctions<T> backward_functions(InstructionSet instructions) {
  const auto scratch = []<class M>(M) { return Backward<T, M>::scratch_size; };
  return {BackwardKernel<T>::on(instructions), with_micro<T>(instructions, scratch),
          AddRowsKernel<T>::on(instructions)};
}

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
