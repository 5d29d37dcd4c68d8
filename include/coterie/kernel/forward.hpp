// The forward tile: scores, online softmax, values.
//
//     S[key][lane]  = sum_d K[key][d] Qt[d][lane]      rows kernel: K's rows broadcast in place
//     online softmax down the keys, every lane on its own
//     Ot[d][lane]  += sum_key V[key][d] P[key][lane]   columns kernel: V's rows broadcast in place
//
// Relative keys join S before its soft cap, relative values join Ot at the end: see relative.hpp.
#pragma once

#include <limits>

#include "coterie/kernel/dispatch.hpp"
#include "coterie/kernel/few_queries.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

template <class T, class M>
struct Forward {
  using L = typename M::L;
  using F = typename L::F;
  using Ints = typename L::Ints;
  static constexpr int lanes = L::count, width = M::width;
  static constexpr int at_once = 2 * M::most_rows;  // keys of a product between which rows are prefetched
  static constexpr T lowest = std::numeric_limits<T>::lowest();

  // reference: the lowest number where a lane has seen nothing.
  struct Scratch {
    T *zeros, *q, *scores, *out, *bias, *reference, *sum, *factor, *by_key, *by_value;
  };

  static constexpr Index scratch_size(const PartSizes& sizes) {
    return tiles_size(sizes) + Tile<T, M>::gather_size(sizes.d, sizes.dv, sizes.keys);
  }
  static constexpr Index tiles_size(const PartSizes& sizes) {
    return (std::max)(tile_size(sizes), FewQueries<T, M>::scratch_size(sizes.d, sizes.dv));
  }
  static constexpr Index tile_size(const PartSizes& sizes) {
    const Index d = padded(sizes.d), dv = padded(sizes.dv);
    return d + d * width + key_block * width + dv * width + padded(sizes.bias_count + 2 * width) + 3 * width +
           2 * Relative<T, M>::buffer_size(sizes.relative_count) + Relative<T, M>::scratch_size(sizes.relative_count);
  }

  static COTERIE_INLINE void run(const AttentionArguments<T>& given, T* scratch) {
    AttentionArguments<T> arguments = given;
    const PartSizes sizes = arguments.sizes();
    Tile<T, M>::gather(arguments, most_in_place, scratch + tiles_size(sizes));
    Scratch f;
    f.zeros = scratch;
    f.q = f.zeros + padded(arguments.d);
    f.scores = f.q + padded(arguments.d) * width;
    f.out = f.scores + key_block * width;
    f.bias = f.out + padded(arguments.dv) * width;
    f.reference = f.bias + padded(arguments.bias_count + 2 * width);
    f.sum = f.reference + width;
    f.factor = f.sum + width;
    f.by_key = f.factor + width;
    f.by_value = f.by_key + Relative<T, M>::buffer_size(arguments.relative_count);
    T* const rest = f.by_value + Relative<T, M>::buffer_size(arguments.relative_count);
    COTERIE_ASSERT((rest + Relative<T, M>::scratch_size(arguments.relative_count) == scratch + tile_size(sizes)));
    // Few queries take the path of rows, but not with relative keys or values: a table is for many.
    const Index few = arguments.relative_count > 0 ? 0 : FewQueries<T, M>::most;
    if (arguments.bias && arguments.entries > few) Tile<T, M>::pad_bias(arguments, f.bias);
    TilePositions<T, M> positions;
    Relative<T, M> relative;
    relative.begin(arguments, positions, rest);
    for (Index first = 0; first < arguments.entries; first += width) {
      const int count = static_cast<int>(std::min<Index>(width, arguments.entries - first));
      if (count <= few)
        FewQueries<T, M>::run(arguments, first, count, scratch);
      else
        tile(arguments, first, count, f, positions, relative);
    }
  }

  static COTERIE_INLINE void tile(const AttentionArguments<T>& arguments, Index first, int count, const Scratch& f,
                                  TilePositions<T, M>& positions, Relative<T, M>& relative) {
    Visibility<T, M> visibility;
    visibility.take(arguments, first, count);
    // Lanes without an entry have queries of zero.
    std::memset(f.zeros, 0, static_cast<std::size_t>(arguments.d) * sizeof(T));
    const T* q_rows[width];
    for (int l = 0; l < visibility.vectors * lanes; ++l)
      q_rows[l] = l < count ? arguments.q.row(arguments.rows[first + l]) : f.zeros;
    M::gather_columns(q_rows, visibility.vectors, arguments.d, arguments.scale * log2_e<T>, f.q, width);
    for (int v = 0; v < visibility.vectors; ++v) {
      L::store(f.reference + v * lanes, F{} + lowest);
      L::store(f.sum + v * lanes, F{});
    }
    Tile<T, M>::clear(visibility, arguments.dv, f.out);
    if (arguments.bias || arguments.relative_count > 0) positions.take(arguments, first, visibility);
    if (arguments.relative_count > 0) relative.take(visibility);
    if (arguments.relative_keys)
      relative.products(visibility, arguments.relative_keys, arguments.relative_keys_stride, arguments.d, f.q,
                        f.by_key);
    if (arguments.relative_values) relative.clear(f.by_value);

    typename Tile<T, M>::Following following(arguments, first, (key_block / at_once) * visibility.blocks());
    const T* k_rows[key_block];
    const T* v_rows[key_block];
    for (int block_begin = visibility.first_block(); block_begin != Visibility<T, M>::none;
         block_begin = visibility.next_block(block_begin)) {
      visibility.cut_by_vectors(block_begin);
      if (arguments.bias || arguments.relative_count > 0) positions.turn_to_block(arguments, visibility, block_begin);
      if (arguments.relative_count > 0) relative.turn_to_block(visibility, block_begin);
      for (int j = visibility.low; j < visibility.high; ++j)
        arguments.locate(j, k_rows[j - block_begin], v_rows[j - block_begin]);
      // S = K Qt
      for (int i = 0; i < visibility.segment_count; ++i) {
        const KeySegment& s = visibility.segments[i];
        for (int j = s.begin; j < s.end; j += at_once) {
          following.fetch();
          M::scores(k_rows + (j - block_begin), (std::min)(at_once, s.end - j), arguments.d, f.q + s.first * lanes,
                    f.scores + (j - block_begin) * width + s.first * lanes, s.last - s.first);
        }
        if (arguments.relative_keys) relative.add(s, block_begin, f.by_key, f.scores);
        if (arguments.soft_cap != 0) Tile<T, M>::cap_scores(arguments, s, block_begin, f.scores, nullptr);
        if (arguments.bias) Tile<T, M>::add_bias(arguments, positions, s, block_begin, f.bias, f.scores);
      }
      // P = 2^(S - reference), with earlier sums rescaled where the reference moved
      const bool rescale = softmax(visibility, block_begin, f);
      if (rescale)
        for (Index c = 0; c < arguments.dv; ++c)
          for (int v = 0; v < visibility.vectors; ++v) {
            F x, factor;
            L::load(f.out + c * width + v * lanes, x);
            L::load(f.factor + v * lanes, factor);
            L::store(f.out + c * width + v * lanes, x * factor);
          }
      if (rescale && arguments.relative_values) relative.rescale(visibility, f.factor, f.by_value);
      // P without what is dropped; the sums have all of it
      if (arguments.dropout_bound != 0)
        for (int i = 0; i < visibility.segment_count; ++i)
          Tile<T, M>::drop(arguments, first, visibility, visibility.segments[i], block_begin, f.scores);
      // Ot += V^T P
      for (int i = 0; i < visibility.segment_count; ++i) {
        Tile<T, M>::accumulate_columns(visibility, visibility.segments[i], block_begin, v_rows, arguments.dv, f.scores,
                                       f.out);
        if (arguments.relative_values) relative.collect(visibility.segments[i], block_begin, f.scores, f.by_value);
      }
    }
    if (arguments.relative_values) {
      relative.straighten(visibility, f.by_value);
      relative.add_columns(visibility, arguments.relative_values, arguments.relative_values_stride, arguments.dv,
                           f.by_value, f.out);
    }
    finish(arguments, first, visibility, f);
  }

  /// S becomes P. Returns whether the reference of a lane that has seen keys before moved; `factor` then rescales what
  /// came before.
  static COTERIE_INLINE bool softmax(const Visibility<T, M>& visibility, int block_begin, const Scratch& f) {
    alignas(64) T block_max[width];
    for (int v = 0; v < visibility.vectors; ++v) L::store(block_max + v * lanes, F{} + lowest);
    for (int i = 0; i < visibility.segment_count; ++i) {
      const KeySegment& s = visibility.segments[i];
      for (int v = s.first; v < s.last; ++v) {
        F best;
        L::load(block_max + v * lanes, best);
        largest(visibility, s, v, block_begin, f.scores, best);
        L::store(block_max + v * lanes, best);
      }
    }
    const bool grown = move_references(visibility, block_max, f);
    for (int i = 0; i < visibility.segment_count; ++i) {
      const KeySegment& s = visibility.segments[i];
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
  static COTERIE_INLINE void largest(const Visibility<T, M>& visibility, const KeySegment& s, int v, int block_begin,
                                     T* scores, F& best) {
    const auto score = [&](int key) __attribute__((always_inline)) {
      return scores + (key - block_begin) * width + v * lanes;
    };
    int begin = s.begin, end = s.end;
    if (s.masked) {
      visibility.unmasked(s, v, begin, end);
      typename Visibility<T, M>::Mask mask;
      visibility.visible(v, mask);
      const auto hide = [&](int from, int until) __attribute__((always_inline)) {
        for (int j = from; j < until; ++j) {
          Ints sees;
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

  /// Where a block's largest logit is above a lane's reference by more than there is room for, it becomes the
  /// reference.
  static COTERIE_INLINE bool move_references(const Visibility<T, M>& visibility, const T* block_max, const Scratch& f) {
    Ints above{}, grew{};
    for (int v = 0; v < visibility.vectors; ++v) {
      F old, best;
      L::load(f.reference + v * lanes, old);
      L::load(block_max + v * lanes, best);
      const Ints sign = (Ints)(old + max_slack<T> - best);  // g++ 12 does not take comparisons here
      above |= sign;
      grew |= sign & (Ints)(F{} + lowest - old);
    }
    if (!L::any_negative(above)) return false;
    for (int v = 0; v < visibility.vectors; ++v) {
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
  static COTERIE_INLINE void finish(const AttentionArguments<T>& arguments, Index first,
                                    const Visibility<T, M>& visibility, const Scratch& f) {
    alignas(64) T inverse[width];
    alignas(64) T log_sum[width];
    for (int v = 0; v < visibility.vectors; ++v) {
      F sum, y;
      L::load(f.sum + v * lanes, sum);
      L::log(sum, y);
      L::store(log_sum + v * lanes, y);
      Ints sees;
      visibility.sees_any(v, sees);
      y = T(1) / sum;
      y = sees < 0 ? y : F{};
      L::store(inverse + v * lanes, y);
    }
    if (arguments.states.reference || arguments.states.inverse || arguments.states.lse)
      for (int l = 0; l < visibility.count; ++l)
        Tile<T, M>::write_state(arguments, arguments.target(first + l), f.reference[l], log_sum[l], inverse[l],
                                visibility.sees_any(l));
    T* rows[width];
    for (int l = 0; l < visibility.count; ++l)
      rows[l] = arguments.out + arguments.target(first + l) * arguments.out_stride;
    M::scatter_columns(f.out, inverse, visibility.count, arguments.dv, rows);
  }
};

COTERIE_KERNEL(ForwardKernel, Forward, run, (const AttentionArguments<T>& arguments, T* scratch), (arguments, scratch))

/// What a forward pass calls.
template <class T>
struct ForwardFunctions {
  void (*forward)(const AttentionArguments<T>&, T* scratch) = nullptr;
  Index (*forward_scratch)(const PartSizes&) = nullptr;  // numbers of scratch memory
};

template <class T>
ForwardFunctions<T> forward_functions(InstructionSet instructions) {
  const auto scratch = []<class M>(M) { return Forward<T, M>::scratch_size; };
  return {ForwardKernel<T>::on(instructions), with_micro<T>(instructions, scratch)};
}

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
