// The attention tile: lanes are queries, keys and values are read in place.
//
// A tile is up to `width` consecutive entries of a part, one per vector lane. Their queries are transposed once; then
// block after block of the group's keys passes by:
//
//     S[key][lane]  = sum_d K[key][d] Qt[d][lane]      rows kernel: K's rows broadcast in place
//     online softmax down the keys, every lane on its own
//     Ot[d][lane]  += sum_key V[key][d] P[key][lane]   columns kernel: V's rows broadcast in place
//
// The row invariant: a lane's numbers come from the same operations in the same order whatever the other lanes see.
// Blocks are cut at multiples of `block` in the group's key list; sums run key by key; a masked key adds an exact zero.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "coterie/core/interval.hpp"
#include "coterie/kernel/lanes.hpp"
#include "coterie/kernel/micro.hpp"
#include "coterie/kernel/panel.hpp"

namespace coterie::detail {

/// A read-only source of rows: `row(i)` for i below `rows` lies in `data`, above in `memory`.
template <class T>
struct RowSource {
  const T* data = nullptr;
  Index stride = 0;
  Index rows = 0;
  const T* memory = nullptr;
  Index memory_stride = 0;

  const T* row(Index i) const { return i < rows ? data + i * stride : memory + (i - rows) * memory_stride; }
};

/// Rows of a partial sum that belong to key blocks [block_begin, block_end), from row `row` on.
struct PartialRange {
  std::int32_t block_begin = 0, block_end = 0;
  Index row = 0;
};

/// One part of a plan for one head: what the forward tile reads and writes.
template <class T>
struct AttentionPart {
  Index entries = 0;                      // of this part
  const std::int32_t* rows = nullptr;     // query row of each entry
  const Interval* visible = nullptr;      // per entry
  const Interval* visible_too = nullptr;  // per entry, or null
  const std::int32_t* keys = nullptr;     // key row of each rank of the group
  RowSource<T> q, k, v;
  Index d = 0, dv = 0;
  T scale = 1;
  const T* bias = nullptr;  // by distance; see AttentionTerms
  Index bias_first = 0, bias_count = 0;
  const std::int32_t* query_positions = nullptr;
  const std::int32_t* key_positions = nullptr;
  bool by_entry = false;  // out and lse: row e of the part instead of row rows[e]
  T* out = nullptr;
  Index out_stride = 0;
  T* lse = nullptr;  // or null
  Index lse_stride = 0;

  Index target(Index entry) const { return by_entry ? entry : rows[entry]; }
  Index query_position(Index entry) const { return query_positions ? query_positions[rows[entry]] : rows[entry]; }
  Index key_position(Index rank) const { return key_positions ? key_positions[keys[rank]] : keys[rank]; }
};

/// What the backward tile reads and writes beside that; out and lse are read.
template <class T>
struct AttentionPartGradients {
  const T* d_out = nullptr;  // by query row
  Index d_out_stride = 0;
  const T* weight = nullptr;  // per entry: factor of d_out, or null
  const T* d_lse = nullptr;   // by query row, or null
  Index d_lse_stride = 0;
  bool by_entry = false;  // d_q: row e of the part instead of row rows[e]
  T* d_q = nullptr;       // added to
  Index d_q_stride = 0;
  const PartialRange* ranges = nullptr;  // of the partial sums, ascending
  Index range_count = 0;
  T* d_k = nullptr;  // partial sums: rows of padded(d) and padded(dv) numbers, added to
  T* d_v = nullptr;
  T* d_bias = nullptr;   // partial sum: bias_count numbers, added to; or null
  T* d_scale = nullptr;  // partial sum: one number, added to; or null
};

/// Keys of a block: key lists are cut at multiples of it.
inline constexpr int key_block = 64;

inline namespace COTERIE_FLAGS_NAMESPACE {

/// Tiles of `M::width` lanes on the micro-kernels M.
template <class T, class M>
struct Tile {
  using L = typename M::L;
  using F = typename L::F;
  using I = typename L::I;
  using Integer = typename L::Integer;
  static constexpr int lanes = L::count, width = M::width, V = width / lanes;
  static constexpr T lowest = std::numeric_limits<T>::lowest();

  /// Keys [begin, end) seen by some lane of vectors [first, last); masked: not by every lane.
  struct Segment {
    int begin, end, first, last;
    bool masked;
  };

  /// What the lanes of a tile see.
  struct Sight {
    alignas(64) Integer begin[2][width];
    alignas(64) Integer end[2][width];
    int all_begin[2][V], all_end[2][V];  // seen by every lane of the vector
    int intervals, vectors, count;
    bool diagonal[V];  // the vector's query positions ascend by one
    Segment segments[4 * V];
    int segment_count;
    int low, high;  // keys of the current block that some lane sees
  };

  static COTERIE_INLINE void look(const AttentionPart<T>& part, Index first, int count, Sight& sight) {
    sight.count = count;
    sight.vectors = (count + lanes - 1) / lanes;
    sight.intervals = part.visible_too ? 2 : 1;
    for (int i = 0; i < sight.intervals; ++i) {
      const Interval* visible = (i ? part.visible_too : part.visible) + first;
      for (int v = 0; v < sight.vectors; ++v) {
        int all_begin = 0, all_end = std::numeric_limits<int>::max();
        for (int l = v * lanes; l < (v + 1) * lanes; ++l) {
          // Lanes without an entry see what the last entry sees; their queries and gradients are zero.
          const Interval seen = visible[std::min(l, count - 1)];
          sight.begin[i][l] = seen.begin;
          sight.end[i][l] = seen.end;
          all_begin = std::max(all_begin, seen.begin);
          all_end = std::min(all_end, seen.end);
        }
        sight.all_begin[i][v] = all_begin;
        sight.all_end[i][v] = all_end;
      }
    }
    if (part.bias)
      for (int v = 0; v < sight.vectors; ++v) {
        const int begin = v * lanes, end = std::min(begin + lanes, count);
        bool diagonal = true;
        for (int l = begin + 1; l < end; ++l)
          diagonal &= part.query_position(first + l) == part.query_position(first + l - 1) + 1;
        sight.diagonal[v] = diagonal;
      }
  }

  /// The first key at or after `key` that some lane sees; the largest int if none.
  static COTERIE_INLINE int next_key(const Sight& sight, int key) {
    Integer next = std::numeric_limits<int>::max();
    for (int i = 0; i < sight.intervals; ++i)
      for (int l = 0; l < sight.vectors * lanes; ++l) {
        const Integer begin = std::max<Integer>(sight.begin[i][l], key);
        if (begin < sight.end[i][l]) next = std::min(next, begin);
      }
    return static_cast<int>(next);
  }

  /// The mask of vector v for key rank `key`.
  static COTERIE_INLINE void visible(const Sight& sight, int v, int key, I& mask) {
    const I rank = I{} + static_cast<Integer>(key);
    const auto load = [](const Integer* p) __attribute__((always_inline))->const I& {
      return *reinterpret_cast<const I*>(p);
    };
    mask = (load(&sight.begin[0][v * lanes]) <= rank) & (load(&sight.end[0][v * lanes]) > rank);
    if (sight.intervals == 2)
      mask |= (load(&sight.begin[1][v * lanes]) <= rank) & (load(&sight.end[1][v * lanes]) > rank);
  }

  /// Cuts the block that begins at `block_begin` into segments of which the same vectors see something.
  static COTERIE_INLINE void cut(Sight& sight, int block_begin) {
    const int block_end = block_begin + key_block;
    const auto inside = [&](int v, int begin, int end) __attribute__((always_inline)) {
      for (int i = 0; i < sight.intervals; ++i)
        if (sight.all_begin[i][v] <= begin && end <= sight.all_end[i][v]) return true;
      return false;
    };
    bool whole = true;
    for (int v = 0; v < sight.vectors; ++v) whole &= inside(v, block_begin, block_end);
    if (whole) {
      sight.segments[0] = {block_begin, block_end, 0, sight.vectors, false};
      sight.segment_count = 1;
      sight.low = block_begin;
      sight.high = block_end;
      return;
    }
    int begins[2][V], ends[2][V], cuts[4 * V], cut_count = 0;
    for (int v = 0; v < sight.vectors; ++v)
      for (int i = 0; i < sight.intervals; ++i) {
        Integer low = block_end, high = block_begin;
        for (int l = v * lanes; l < (v + 1) * lanes; ++l) {
          const Integer begin = std::max<Integer>(sight.begin[i][l], block_begin);
          const Integer end = std::min<Integer>(sight.end[i][l], block_end);
          low = begin < end ? std::min(low, begin) : low;
          high = begin < end ? std::max(high, end) : high;
        }
        begins[i][v] = static_cast<int>(low);
        ends[i][v] = static_cast<int>(high);
        if (low >= high) continue;
        for (int bound : {begins[i][v], ends[i][v]}) {
          int at = cut_count;
          while (at > 0 && cuts[at - 1] > bound) --at;
          if (at > 0 && cuts[at - 1] == bound) continue;
          for (int c = cut_count; c > at; --c) cuts[c] = cuts[c - 1];
          cuts[at] = bound;
          ++cut_count;
        }
      }
    sight.segment_count = 0;
    sight.low = block_end;
    sight.high = block_begin;
    for (int c = 0; c + 1 < cut_count; ++c) {
      Segment s{cuts[c], cuts[c + 1], V, 0, false};
      for (int v = 0; v < sight.vectors; ++v)
        for (int i = 0; i < sight.intervals; ++i)
          if (begins[i][v] <= s.begin && s.end <= ends[i][v]) {
            s.first = std::min(s.first, v);
            s.last = v + 1;
          }
      if (s.first >= s.last) continue;
      for (int v = s.first; v < s.last; ++v) s.masked |= !inside(v, s.begin, s.end);
      sight.segments[sight.segment_count++] = s;
      sight.low = std::min(sight.low, s.begin);
      sight.high = std::max(sight.high, s.end);
    }
  }

  /// Copies rows of `source` into `rows[lane][padded(columns)]` times `factor` (per lane or one), and transposes them
  /// into `columns_out[column][lane]`. Lanes without an entry become zero.
  template <class Row, class Factor>
  static COTERIE_INLINE void pack(const Sight& sight, Index columns, T* rows, T* transposed, const Row& row,
                                  const Factor& factor) {
    const Index stride = padded(columns);
    for (int l = 0; l < sight.vectors * lanes; ++l) {
      T* to = rows + l * stride;
      if (l < sight.count) {
        const T* from = row(l);
        const T f = factor(l);
        for (Index c = 0; c < columns; ++c) to[c] = from[c] * f;
        for (Index c = columns; c < stride; ++c) to[c] = 0;
      } else {
        std::memset(to, 0, static_cast<std::size_t>(stride) * sizeof(T));
      }
    }
    M::transpose_in(rows, stride, sight.vectors, columns, transposed);
  }

  // The bias table with its end columns repeated `width` times on both sides, so that edge vectors load in place.
  static COTERIE_INLINE void pad_bias(const AttentionPart<T>& part, T* table) {
    for (Index i = 0; i < part.bias_count + 2 * width; ++i)
      table[i] = part.bias[std::clamp<Index>(i - width, 0, part.bias_count - 1)];
  }

  /// The column of the padded table for lane l of vector v and a key; lanes of a diagonal vector follow one by one.
  static COTERIE_INLINE Index bias_column(const AttentionPart<T>& part, Index first, const Sight& sight, int l,
                                          int key) {
    const Index distance = part.query_position(first + std::min(l, sight.count - 1)) - part.key_position(key);
    return std::clamp<Index>(distance - part.bias_first, -width, part.bias_count - 1 + width) + width;
  }

  static COTERIE_INLINE bool bias_in_place(const AttentionPart<T>& part, Index first, const Sight& sight, int v,
                                           int key) {
    if (!sight.diagonal[v]) return false;
    const Index distance = part.query_position(first + v * lanes) - part.key_position(key) - part.bias_first;
    return distance >= -width && distance + lanes <= part.bias_count + width;
  }

  static COTERIE_INLINE void add_bias(const AttentionPart<T>& part, Index first, const Sight& sight, const Segment& s,
                                      int block_begin, const T* table, T* scores) {
    for (int key = s.begin; key < s.end; ++key)
      for (int v = s.first; v < s.last; ++v) {
        F x, b;
        T* at = scores + (key - block_begin) * width + v * lanes;
        L::load(at, x);
        if (bias_in_place(part, first, sight, v, key)) {
          L::load(table + bias_column(part, first, sight, v * lanes, key), b);
        } else {
          for (int l = 0; l < lanes; ++l) b[l] = table[bias_column(part, first, sight, v * lanes + l, key)];
        }
        L::store(at, x + b);
      }
  }

  static COTERIE_INLINE void add_bias_gradient(const AttentionPart<T>& part, Index first, const Sight& sight,
                                               const Segment& s, int block_begin, const T* d_scores, T* table) {
    for (int key = s.begin; key < s.end; ++key)
      for (int v = s.first; v < s.last; ++v) {
        F x, b;
        L::load(d_scores + (key - block_begin) * width + v * lanes, x);
        if (bias_in_place(part, first, sight, v, key)) {
          T* at = table + bias_column(part, first, sight, v * lanes, key);
          L::load(at, b);
          L::store(at, b + x);
        } else {
          for (int l = 0; l < lanes && v * lanes + l < sight.count; ++l)
            table[bias_column(part, first, sight, v * lanes + l, key)] += x[l];
        }
      }
  }

  // ---- forward ------------------------------------------------------------------------------------------------------

  struct Forward {
    T *rows, *q, *scores, *out, *bias, *max, *sum, *factor;
  };

  static constexpr Index forward_scratch(Index d, Index dv, Index bias_count) {
    return padded(std::max(d, dv)) * width + padded(d) * width + key_block * width + padded(dv) * width +
           padded(bias_count + 2 * width) + 3 * width;
  }

  static COTERIE_INLINE void forward(const AttentionPart<T>& part, T* scratch) {
    Forward f;
    f.rows = scratch;
    f.q = f.rows + padded(std::max(part.d, part.dv)) * width;
    f.scores = f.q + padded(part.d) * width;
    f.out = f.scores + key_block * width;
    f.bias = f.out + padded(part.dv) * width;
    f.max = f.bias + padded(part.bias_count + 2 * width);
    f.sum = f.max + width;
    f.factor = f.sum + width;
    if (part.bias) pad_bias(part, f.bias);
    for (Index first = 0; first < part.entries; first += width)
      forward_tile(part, first, static_cast<int>(std::min<Index>(width, part.entries - first)), f);
  }

  static COTERIE_INLINE void forward_tile(const AttentionPart<T>& part, Index first, int count, const Forward& f) {
    Sight sight;
    look(part, first, count, sight);
    const auto q_row = [&](int l) __attribute__((always_inline)) { return part.q.row(part.rows[first + l]); };
    const auto q_factor = [&](int) __attribute__((always_inline)) { return part.scale; };
    pack(sight, part.d, f.rows, f.q, q_row, q_factor);
    for (int v = 0; v < sight.vectors; ++v) {
      L::store(f.max + v * lanes, F{} + lowest);
      L::store(f.sum + v * lanes, F{});
    }
    std::memset(f.out, 0, static_cast<std::size_t>(padded(part.dv) * width) * sizeof(T));

    const T* k_rows[key_block];
    const T* v_rows[key_block];
    for (int key = next_key(sight, 0); key != std::numeric_limits<int>::max();
         key = next_key(sight, key / key_block * key_block + key_block)) {
      const int block_begin = key / key_block * key_block;
      cut(sight, block_begin);
      for (int j = sight.low; j < sight.high; ++j) {
        k_rows[j - block_begin] = part.k.row(part.keys[j]);
        v_rows[j - block_begin] = part.v.row(part.keys[j]);
      }
      // S = K Qt
      for (int i = 0; i < sight.segment_count; ++i) {
        const Segment& s = sight.segments[i];
        M::scores(k_rows + (s.begin - block_begin), s.end - s.begin, part.d, f.q + s.first * lanes,
                  f.scores + (s.begin - block_begin) * width + s.first * lanes, s.last - s.first);
        if (part.bias) add_bias(part, first, sight, s, block_begin, f.bias, f.scores);
      }
      // P = exp(S - max), with earlier sums rescaled where the maximum grew
      const bool rescale = softmax(sight, block_begin, f);
      if (rescale)
        for (Index c = 0; c < part.dv; ++c)
          for (int v = 0; v < sight.vectors; ++v) {
            F x, factor;
            L::load(f.out + c * width + v * lanes, x);
            L::load(f.factor + v * lanes, factor);
            L::store(f.out + c * width + v * lanes, x * factor);
          }
      // Ot += V^T P
      for (int i = 0; i < sight.segment_count; ++i)
        accumulate_columns(sight, sight.segments[i], block_begin, v_rows, part.dv, f.scores, f.out);
    }
    finish_forward(part, first, sight, f);
  }

  /// Ot[c][lane] += sum over the segment's keys of rows[key][c] P[key][lane].
  static COTERIE_INLINE void accumulate_columns(const Sight& sight, const Segment& s, int block_begin,
                                                const T* const* rows, Index columns, const T* p, T* out) {
    const int begin = s.begin - block_begin, end = s.end - block_begin, first = s.first * lanes;
    const Index from = M::columns(rows, begin, end, columns, p + first, out + first, s.last - s.first, s.masked);
    if (from == columns) return;
    // A non-finite row met a masked lane: 0 * NaN must not reach it. The same operations, kept only under the mask.
    for (Index c = from; c < columns; ++c)
      for (int v = s.first; v < s.last; ++v) {
        F sum, x;
        L::load(out + c * width + v * lanes, sum);
        for (int j = begin; j < end; ++j) {
          I mask;
          visible(sight, v, block_begin + j, mask);
          L::load(p + j * width + v * lanes, x);
          const F next = sum + rows[j][c] * x;
          sum = mask ? next : sum;
        }
        L::store(out + c * width + v * lanes, sum);
      }
  }

  /// Returns whether any lane's maximum grew after its first block; `factor` then rescales what came before.
  static COTERIE_INLINE bool softmax(const Sight& sight, int block_begin, const Forward& f) {
    alignas(64) T block_max[width];
    for (int v = 0; v < sight.vectors; ++v) L::store(block_max + v * lanes, F{} + lowest);
    for (int i = 0; i < sight.segment_count; ++i) {
      const Segment& s = sight.segments[i];
      for (int v = s.first; v < s.last; ++v) {
        F best, x;
        L::load(block_max + v * lanes, best);
        T* at = f.scores + (s.begin - block_begin) * width + v * lanes;
        if (s.masked) {
          for (int j = s.begin; j < s.end; ++j, at += width) {
            I mask;
            visible(sight, v, j, mask);
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
      L::exp(old - safe, factor);
      const I changed = (best > old) & (old > F{} + lowest);
      for (int l = 0; l < lanes; ++l) grown |= changed[l];
      factor = changed ? factor : F{} + T(1);
      L::store(f.max + v * lanes, best);
      L::store(block_max + v * lanes, safe);
      L::store(f.factor + v * lanes, factor);
      L::store(f.sum + v * lanes, sum * factor);
    }
    for (int i = 0; i < sight.segment_count; ++i) {
      const Segment& s = sight.segments[i];
      for (int v = s.first; v < s.last; ++v) {
        F best, sum, x, p;
        L::load(block_max + v * lanes, best);
        L::load(f.sum + v * lanes, sum);
        T* at = f.scores + (s.begin - block_begin) * width + v * lanes;
        for (int j = s.begin; j < s.end; ++j, at += width) {
          L::load(at, x);
          L::exp(x - best, p);
          sum += p;
          L::store(at, p);
        }
        L::store(f.sum + v * lanes, sum);
      }
    }
    return grown != 0;
  }

  /// out = Ot / sum, lse = max + log(sum); zero and minus infinity where nothing is seen.
  static COTERIE_INLINE void finish_forward(const AttentionPart<T>& part, Index first, const Sight& sight,
                                            const Forward& f) {
    alignas(64) T inverse[width];
    for (int l = 0; l < sight.count; ++l) {
      const bool sees = sees_any(sight, l);
      inverse[l] = sees ? T(1) / f.sum[l] : T(0);
      if (part.lse)
        part.lse[part.target(first + l) * part.lse_stride] =
            sees ? f.max[l] + std::log(f.sum[l]) : -std::numeric_limits<T>::infinity();
    }
    const Index stride = padded(part.dv);
    M::transpose_out(f.out, sight.vectors, part.dv, f.rows, stride);
    for (int l = 0; l < sight.count; ++l) {
      T* to = part.out + part.target(first + l) * part.out_stride;
      const T* from = f.rows + l * stride;
      for (Index c = 0; c < part.dv; ++c) to[c] = from[c] * inverse[l];
    }
  }

  static COTERIE_INLINE bool sees_any(const Sight& sight, int l) {
    return sight.begin[0][l] < sight.end[0][l] || (sight.intervals == 2 && sight.begin[1][l] < sight.end[1][l]);
  }

  // ---- backward -----------------------------------------------------------------------------------------------------

  struct Backward {
    T *q_rows, *q, *d_out_rows, *d_out, *scores, *d_scores, *d_q, *bias, *d_bias, *lse, *delta;
  };

  static constexpr Index backward_scratch(Index d, Index dv, Index bias_count) {
    return 3 * padded(d) * width + 2 * padded(dv) * width + 2 * key_block * width + 2 * padded(bias_count + 2 * width) +
           2 * width;
  }

  static COTERIE_INLINE void backward(const AttentionPart<T>& part, const AttentionPartGradients<T>& gradients,
                                      T* scratch) {
    Backward b;
    b.q_rows = scratch;
    b.q = b.q_rows + padded(part.d) * width;
    b.d_q = b.q + padded(part.d) * width;
    b.d_out_rows = b.d_q + padded(part.d) * width;
    b.d_out = b.d_out_rows + padded(part.dv) * width;
    b.scores = b.d_out + padded(part.dv) * width;
    b.d_scores = b.scores + key_block * width;
    b.bias = b.d_scores + key_block * width;
    b.d_bias = b.bias + padded(part.bias_count + 2 * width);
    b.lse = b.d_bias + padded(part.bias_count + 2 * width);
    b.delta = b.lse + width;
    if (part.bias) {
      pad_bias(part, b.bias);
      std::fill_n(b.d_bias, part.bias_count + 2 * width, T(0));
    }
    for (Index first = 0; first < part.entries; first += width)
      backward_tile(part, gradients, first, static_cast<int>(std::min<Index>(width, part.entries - first)), b);
    if (gradients.d_bias)
      for (Index i = 0; i < part.bias_count + 2 * width; ++i)
        gradients.d_bias[std::clamp<Index>(i - width, 0, part.bias_count - 1)] += b.d_bias[i];
  }

  static COTERIE_INLINE void backward_tile(const AttentionPart<T>& part, const AttentionPartGradients<T>& gradients,
                                           Index first, int count, const Backward& b) {
    Sight sight;
    look(part, first, count, sight);
    const auto q_row = [&](int l) __attribute__((always_inline)) { return part.q.row(part.rows[first + l]); };
    const auto q_factor = [&](int) __attribute__((always_inline)) { return part.scale; };
    const auto d_row = [&](int l) __attribute__((always_inline)) {
      return gradients.d_out + part.rows[first + l] * gradients.d_out_stride;
    };
    const auto d_factor = [&](int l) __attribute__((always_inline)) {
      return gradients.weight ? gradients.weight[first + l] : T(1);
    };
    pack(sight, part.d, b.q_rows, b.q, q_row, q_factor);
    pack(sight, part.dv, b.d_out_rows, b.d_out, d_row, d_factor);
    std::memset(b.d_q, 0, static_cast<std::size_t>(padded(part.d) * width) * sizeof(T));
    for (int l = 0; l < sight.vectors * lanes; ++l) {
      b.lse[l] = b.delta[l] = 0;
      if (l >= count || !sees_any(sight, l)) continue;
      // delta = sum_c d_out[c] out[c] - d_lse
      const Index target = part.target(first + l);
      const T* out = part.out + target * part.out_stride;
      const T* d_out = b.d_out_rows + l * padded(part.dv);
      T delta = gradients.d_lse ? -gradients.d_lse[part.rows[first + l] * gradients.d_lse_stride] : T(0);
      for (Index c = 0; c < part.dv; ++c) delta += d_out[c] * out[c];
      b.delta[l] = delta;
      b.lse[l] = part.lse[target * part.lse_stride];
    }

    const T* k_rows[key_block];
    const T* v_rows[key_block];
    const T* p_rows[key_block];
    for (int key = next_key(sight, 0); key != std::numeric_limits<int>::max();
         key = next_key(sight, key / key_block * key_block + key_block)) {
      const int block_begin = key / key_block * key_block;
      cut(sight, block_begin);
      for (int j = sight.low; j < sight.high; ++j) {
        k_rows[j - block_begin] = part.k.row(part.keys[j]);
        v_rows[j - block_begin] = part.v.row(part.keys[j]);
      }
      for (int i = 0; i < sight.segment_count; ++i) {
        const Segment& s = sight.segments[i];
        // S = K Qt, then dP = V dOt
        for (int pass = 0; pass < 2; ++pass) {
          const T* const* rows = pass ? v_rows : k_rows;
          T* to = pass ? b.d_scores : b.scores;
          M::scores(rows + (s.begin - block_begin), s.end - s.begin, pass ? part.dv : part.d,
                    (pass ? b.d_out : b.q) + s.first * lanes, to + (s.begin - block_begin) * width + s.first * lanes,
                    s.last - s.first);
        }
        if (part.bias) add_bias(part, first, sight, s, block_begin, b.bias, b.scores);
        probabilities(sight, s, block_begin, b);
        if (gradients.d_bias) add_bias_gradient(part, first, sight, s, block_begin, b.d_scores, b.d_bias);
        // dQt += K^T dS
        accumulate_columns(sight, s, block_begin, k_rows, part.d, b.d_scores, b.d_q);
        // dV += P dO, then dK += dS Q
        const Index row = partial_row(gradients, block_begin / key_block) + (s.begin - block_begin);
        for (int pass = 0; pass < 2; ++pass) {
          const T* p = pass ? b.d_scores : b.scores;
          for (int j = s.begin - block_begin; j < s.end - block_begin; ++j) p_rows[j] = p + j * width + s.first * lanes;
          const Index columns = padded(pass ? part.d : part.dv);
          accumulate_rows(sight, s, block_begin, p_rows, (pass ? b.q_rows : b.d_out_rows) + s.first * lanes * columns,
                          columns, (pass ? gradients.d_k : gradients.d_v) + row * columns);
        }
      }
    }

    // d_q += scale * dQ, d_scale += q . dQ
    M::transpose_out(b.d_q, sight.vectors, part.d, b.q_rows, padded(part.d));
    for (int l = 0; l < count; ++l) {
      const T* from = b.q_rows + l * padded(part.d);
      const T* q = q_row(l);
      T* to = gradients.d_q + (gradients.by_entry ? first + l : Index(part.rows[first + l])) * gradients.d_q_stride;
      T d_scale = 0;
      for (Index c = 0; c < part.d; ++c) {
        to[c] += from[c] * part.scale;
        d_scale += from[c] * q[c];
      }
      if (gradients.d_scale && sees_any(sight, l)) *gradients.d_scale += d_scale;
    }
  }

  static COTERIE_INLINE Index partial_row(const AttentionPartGradients<T>& gradients, int block) {
    const PartialRange* range = gradients.ranges;
    while (block >= range->block_end) ++range;
    COTERIE_ASSERT(range < gradients.ranges + gradients.range_count && block >= range->block_begin);
    return range->row + Index(block - range->block_begin) * key_block;
  }

  /// P = exp(S - lse), dS = P (dP - delta); both zero where masked.
  static COTERIE_INLINE void probabilities(const Sight& sight, const Segment& s, int block_begin, const Backward& b) {
    for (int v = s.first; v < s.last; ++v) {
      F lse, delta;
      L::load(b.lse + v * lanes, lse);
      L::load(b.delta + v * lanes, delta);
      for (int j = s.begin; j < s.end; ++j) {
        const Index at = (j - block_begin) * width + v * lanes;
        F x, p, d_p;
        L::load(b.scores + at, x);
        L::load(b.d_scores + at, d_p);
        L::exp(x - lse, p);
        F d_s = p * (d_p - delta);
        if (s.masked) {
          I mask;
          visible(sight, v, j, mask);
          p = mask ? p : F{};
          d_s = mask ? d_s : F{};
        }
        L::store(b.scores + at, p);
        L::store(b.d_scores + at, d_s);
      }
    }
  }

  /// to[key][c] += sum over the segment's lanes of p[key][lane] x[lane][c].
  static COTERIE_INLINE void accumulate_rows(const Sight& sight, const Segment& s, int block_begin, const T* const* p,
                                             const T* x, Index columns, T* to) {
    const int keys = s.end - s.begin, depth = (s.last - s.first) * lanes;
    const Index from = M::rows(p + (s.begin - block_begin), keys, depth, x, columns, to, s.masked);
    if (from == columns) return;
    for (Index c = from; c < columns; c += lanes)
      for (int j = 0; j < keys; ++j) {
        F sum, y;
        L::load(to + j * columns + c, sum);
        for (int l = 0; l < depth; ++l) {
          I mask;
          visible(sight, s.first + l / lanes, s.begin + j, mask);
          if (mask[l % lanes] == 0) continue;
          L::load(x + l * columns + c, y);
          sum = sum + p[s.begin - block_begin + j][l] * y;
        }
        L::store(to + j * columns + c, sum);
      }
  }
};

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
