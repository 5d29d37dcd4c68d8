// The micro-kernels: a few rows of sums in registers, one factor broadcast, the other loaded as vectors.
#pragma once

#include "coterie/kernel/part.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

/// Up to R rows by V vectors of sums stay in registers. Every sum runs over its terms in order, one multiply-add each, so
/// its bits do not depend on how rows and vectors are cut into calls.
template <class T, int Bytes, int V, int R>
struct Micro {
  using L = Lanes<T, Bytes>;
  using F = typename L::F;
  static constexpr int lanes = L::count, width = lanes * V, most_rows = R;

  // c[r][v] (+)= sum_l a[r][l] b[l][v]: a by rows.
  template <int Rows, int N, bool Add>
  static COTERIE_INLINE void by_rows(const T* const* a, Index depth, const T* b, Index b_stride, T* c, Index c_stride) {
    F sum[Rows][N];
    COTERIE_UNROLL for (int r = 0; r < Rows; ++r) COTERIE_UNROLL for (int v = 0; v < N; ++v) {
      if constexpr (Add)
        L::load(c + r * c_stride + v * lanes, sum[r][v]);
      else
        sum[r][v] = F{};
    }
    for (Index l = 0; l < depth; ++l) {
      F x[N];
      COTERIE_UNROLL for (int v = 0; v < N; ++v) L::load(b + l * b_stride + v * lanes, x[v]);
      COTERIE_UNROLL for (int r = 0; r < Rows; ++r) {
        const T y = a[r][l];
        COTERIE_UNROLL for (int v = 0; v < N; ++v) {
          COTERIE_OPAQUE(sum[r][v]);
          sum[r][v] += y * x[v];
        }
      }
    }
    COTERIE_UNROLL for (int r = 0; r < Rows; ++r) COTERIE_UNROLL for (int v = 0; v < N; ++v)
        L::store(c + r * c_stride + v * lanes, sum[r][v]);
  }

  template <int N, bool Add>
  static COTERIE_INLINE void all_rows(const T* const* a, Index count, Index depth, const T* b, Index b_stride, T* c,
                                      Index c_stride) {
    Index r = 0;
    for (; r + R <= count; r += R) by_rows<R, N, Add>(a + r, depth, b, b_stride, c + r * c_stride, c_stride);
    if constexpr (R > 4)
      if (count - r >= 4) {
        by_rows<4, N, Add>(a + r, depth, b, b_stride, c + r * c_stride, c_stride);
        r += 4;
      }
    if (count - r >= 2) {
      by_rows<2, N, Add>(a + r, depth, b, b_stride, c + r * c_stride, c_stride);
      r += 2;
    }
    if (count - r >= 1) by_rows<1, N, Add>(a + r, depth, b, b_stride, c + r * c_stride, c_stride);
  }

  /// c[r][v] (+)= sum_l a[r][l] b[l][v] for `count` rows and `vectors` <= V vectors.
  template <bool Add>
  static COTERIE_INLINE void product(const T* const* a, Index count, Index depth, const T* b, Index b_stride, T* c,
                                     Index c_stride, int vectors) {
    if constexpr (V == 4) {
      if (vectors == 4) return all_rows<4, Add>(a, count, depth, b, b_stride, c, c_stride);
      if (vectors == 3) return all_rows<3, Add>(a, count, depth, b, b_stride, c, c_stride);
    }
    if (vectors == 2) return all_rows<2, Add>(a, count, depth, b, b_stride, c, c_stride);
    all_rows<1, Add>(a, count, depth, b, b_stride, c, c_stride);
  }

  /// transposed[column][lane] = rows[lane][column] for `vectors` vectors of lanes; rows have `stride` numbers, a whole
  /// number of vectors, of which the first `columns` (rounded up to vectors) are taken.
  static COTERIE_INLINE void transpose_in(const T* rows, Index stride, int vectors, Index columns, T* transposed) {
    for (int v = 0; v < vectors; ++v)
      for (Index c = 0; c < columns; c += lanes) {
        F square[lanes];
        COTERIE_UNROLL for (int l = 0; l < lanes; ++l) L::load(rows + (v * lanes + l) * stride + c, square[l]);
        L::transpose(square);
        COTERIE_UNROLL for (int l = 0; l < lanes; ++l) L::store(transposed + (c + l) * width + v * lanes, square[l]);
      }
  }

  /// Undoes transpose_in.
  static COTERIE_INLINE void transpose_out(const T* transposed, int vectors, Index columns, T* rows, Index stride) {
    for (int v = 0; v < vectors; ++v)
      for (Index c = 0; c < columns; c += lanes) {
        F square[lanes];
        COTERIE_UNROLL for (int l = 0; l < lanes; ++l) L::load(transposed + (c + l) * width + v * lanes, square[l]);
        L::transpose(square);
        COTERIE_UNROLL for (int l = 0; l < lanes; ++l) L::store(rows + (v * lanes + l) * stride + c, square[l]);
      }
  }

  /// s[key][lane] = sum_d keys[key][d] qt[d][lane], rows of `width` lanes.
  static COTERIE_INLINE void scores(const T* const* keys, Index count, Index depth, const T* qt, T* s, int vectors) {
    product<false>(keys, count, depth, qt, width, s, width, vectors);
  }

  /// to[key][c] += sum_l p[key][l] x[l][c] for padded rows of `columns` numbers.
  /// Checked: returns the first column of a strip of x that is not finite, otherwise `columns`; strips from there on are
  /// left alone.
  static COTERIE_INLINE Index rows(const T* const* p, Index count, Index depth, const T* x, Index columns, T* to,
                                   bool checked) {
    for (Index c = 0; c < columns; c += width) {
      const int vectors = static_cast<int>((columns - c < width ? columns - c : Index(width)) / lanes);
      if (checked) {
        F sum{}, y;
        for (Index l = 0; l < depth; ++l)
          for (int v = 0; v < vectors; ++v) {
            L::load(x + l * columns + c + v * lanes, y);
            sum += y;
          }
        if (!L::finite(sum)) return c;
      }
      product<true>(p, count, depth, x + c, columns, to + c, columns, vectors);
    }
    return columns;
  }

  // out[c][v] += sum_j rows[j][c] p[j][v], c < Columns: rows by columns. False, and nothing stored, if checked and not finite.
  template <int Columns, int N>
  static COTERIE_INLINE bool by_columns(const T* const* rows, Index begin, Index end, Index column, const T* p, T* out,
                                        bool checked) {
    F sum[Columns][N];
    COTERIE_UNROLL for (int c = 0; c < Columns; ++c) COTERIE_UNROLL for (int v = 0; v < N; ++v)
        L::load(out + c * width + v * lanes, sum[c][v]);
    for (Index j = begin; j < end; ++j) {
      const T* row = rows[j] + column;
      F x[N];
      COTERIE_UNROLL for (int v = 0; v < N; ++v) L::load(p + j * width + v * lanes, x[v]);
      COTERIE_UNROLL for (int c = 0; c < Columns; ++c) {
        const T y = row[c];
        COTERIE_UNROLL for (int v = 0; v < N; ++v) {
          COTERIE_OPAQUE(sum[c][v]);
          sum[c][v] += y * x[v];
        }
      }
    }
    if (checked) {
      // A non-finite number of a row makes all its lanes non-finite: one vector tells.
      F any = sum[0][0];
      COTERIE_UNROLL for (int c = 1; c < Columns; ++c) any += sum[c][0];
      if (!L::finite(any)) return false;
    }
    COTERIE_UNROLL for (int c = 0; c < Columns; ++c) COTERIE_UNROLL for (int v = 0; v < N; ++v)
        L::store(out + c * width + v * lanes, sum[c][v]);
    return true;
  }

  // s[key] = sum_d q[d] keys[d][key] for N vectors of keys; keys have rows of key_block numbers.
  template <int N>
  static COTERIE_INLINE void row_scores_of(const T* q, Index depth, const T* keys, T* s) {
    F sum[N];
    COTERIE_UNROLL for (int v = 0; v < N; ++v) sum[v] = F{};
    for (Index l = 0; l < depth; ++l) {
      const T y = q[l];
      COTERIE_UNROLL for (int v = 0; v < N; ++v) {
        F x;
        L::load(keys + l * key_block + v * lanes, x);
        COTERIE_OPAQUE(sum[v]);
        sum[v] += y * x;
      }
    }
    COTERIE_UNROLL for (int v = 0; v < N; ++v) L::store(s + v * lanes, sum[v]);
  }

  /// s[key] = sum_d q[d] keys[d][key] for `vectors` vectors of keys: one query, lanes are keys.
  static COTERIE_INLINE void row_scores(const T* q, Index depth, const T* keys, T* s, int vectors) {
    int v = 0;
    for (; v + 8 <= vectors; v += 8) row_scores_of<8>(q, depth, keys + v * lanes, s + v * lanes);
    for (; v + 4 <= vectors; v += 4) row_scores_of<4>(q, depth, keys + v * lanes, s + v * lanes);
    for (; v < vectors; ++v) row_scores_of<1>(q, depth, keys + v * lanes, s + v * lanes);
  }

  // out[c] += sum over j in [begin, end) of p[j] rows[j][c], N vectors of columns from `column` on; and total += p[j].
  template <int N>
  static COTERIE_INLINE void row_values_of(const T* p, const T* const* rows, Index begin, Index end, Index column,
                                           T* out, T& total) {
    F sum[N];
    T all = total;
    COTERIE_UNROLL for (int v = 0; v < N; ++v) L::load(out + column + v * lanes, sum[v]);
    for (Index j = begin; j < end; ++j) {
      const T y = p[j];
      const T* row = rows[j] + column;
      all += y;
      COTERIE_UNROLL for (int v = 0; v < N; ++v) {
        F x;
        L::load(row + v * lanes, x);
        COTERIE_OPAQUE(sum[v]);
        sum[v] += y * x;
      }
    }
    COTERIE_UNROLL for (int v = 0; v < N; ++v) L::store(out + column + v * lanes, sum[v]);
    total = all;
  }

  /// out[c] += sum over j in [begin, end) of p[j] rows[j][c], total += sum of p[j]: one query, lanes are columns.
  static COTERIE_INLINE void row_values(const T* p, const T* const* rows, Index begin, Index end, Index columns, T* out,
                                        T& total) {
    T again = 0;  // the sum of p runs beside the first strip's products; later strips' goes nowhere
    Index c = 0;
    for (; c + 8 * lanes <= columns; c += 8 * lanes)
      row_values_of<8>(p, rows, begin, end, c, out, c == 0 ? total : again);
    for (; c + 4 * lanes <= columns; c += 4 * lanes)
      row_values_of<4>(p, rows, begin, end, c, out, c == 0 ? total : again);
    for (; c + lanes <= columns; c += lanes) row_values_of<1>(p, rows, begin, end, c, out, c == 0 ? total : again);
    if (c == 0)
      for (Index j = begin; j < end; ++j) total += p[j];
    for (; c < columns; ++c) {
      T sum = out[c];
      for (Index j = begin; j < end; ++j) {
        COTERIE_OPAQUE(sum);
        sum += p[j] * rows[j][c];
      }
      out[c] = sum;
    }
  }

  template <int N>
  static COTERIE_INLINE Index all_columns(const T* const* rows, Index begin, Index end, Index columns, const T* p,
                                          T* out, bool checked) {
    Index c = 0;
    for (; c + R <= columns; c += R)
      if (!by_columns<R, N>(rows, begin, end, c, p, out + c * width, checked)) return c;
    if constexpr (R > 4)
      if (columns - c >= 4) {
        if (!by_columns<4, N>(rows, begin, end, c, p, out + c * width, checked)) return c;
        c += 4;
      }
    if (columns - c >= 2) {
      if (!by_columns<2, N>(rows, begin, end, c, p, out + c * width, checked)) return c;
      c += 2;
    }
    if (columns - c >= 1 && !by_columns<1, N>(rows, begin, end, c, p, out + c * width, checked)) return c;
    return columns;
  }

  /// out[c][lane] += sum over j in [begin, end) of rows[j][c] p[j][lane], for `vectors` <= V vectors of rows of `width`.
  /// Checked: returns the first column not done, because a row with a non-finite number met it; otherwise `columns`.
  static COTERIE_INLINE Index columns(const T* const* rows, Index begin, Index end, Index columns, const T* p, T* out,
                                      int vectors, bool checked) {
    if constexpr (V == 4) {
      if (vectors == 4) return all_columns<4>(rows, begin, end, columns, p, out, checked);
      if (vectors == 3) return all_columns<3>(rows, begin, end, columns, p, out, checked);
    }
    if (vectors == 2) return all_columns<2>(rows, begin, end, columns, p, out, checked);
    return all_columns<1>(rows, begin, end, columns, p, out, checked);
  }
};

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
