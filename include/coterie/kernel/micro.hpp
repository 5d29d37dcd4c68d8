// The micro-kernels: a few rows of sums in registers, one factor broadcast, the other loaded as vectors.
#pragma once

#include <algorithm>

#include "coterie/kernel/arguments.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

/// Sums stay in registers, R rows by V vectors of them or as many for fewer vectors. Every sum runs over its terms in
/// order, one multiply-add each, so its bits do not depend on how rows and vectors are cut into calls.
template <class T, int Bytes, int V, int R>
struct Micro {
  using L = Lanes<T, Bytes>;
  using F = typename L::F;
  static constexpr int lanes = L::count, width = lanes * V, most_rows = R;

  /// Calls work, which micro-kernels of an instruction set compile as a function of its own: what is rare, or seldom
  /// called, is kept out of the loops around it, where it would cost registers and compile time.
  template <class Work>
  static COTERIE_INLINE void apart(const Work& work) {
    work();
  }

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
        COTERIE_UNROLL for (int v = 0; v < N; ++v) L::add_product(y, x[v], sum[r][v]);
      }
    }
    COTERIE_UNROLL for (int r = 0; r < Rows; ++r) COTERIE_UNROLL for (int v = 0; v < N; ++v)
        L::store(c + r * c_stride + v * lanes, sum[r][v]);
  }

  /// Rows of sums for N vectors: more where one vector alone would leave the machine waiting, as far as there are
  /// registers for their addresses; columns, which need one address, up to 2 R. And how many of what is left after so
  /// many at a time.
  template <int N>
  static constexpr int rows_for = N == 1 ? (R < 6 ? R : 8) : R;
  template <int N>
  static constexpr int columns_for = 2 * N <= V ? 2 * R : R;
  static constexpr int fewer(int rows) { return rows > R ? R : rows > 4 ? 4 : rows / 2; }

  template <int Rows, int N, bool Add>
  static COTERIE_INLINE void all_rows(const T* const* a, Index count, Index depth, const T* b, Index b_stride, T* c,
                                      Index c_stride) {
    for (; count >= Rows; count -= Rows, a += Rows, c += Rows * c_stride)
      by_rows<Rows, N, Add>(a, depth, b, b_stride, c, c_stride);
    if constexpr (Rows > 1) all_rows<fewer(Rows), N, Add>(a, count, depth, b, b_stride, c, c_stride);
  }

  /// c[r][v] (+)= sum_l a[r][l] b[l][v] for `count` rows and `vectors` <= V vectors.
  template <bool Add>
  static COTERIE_INLINE void product(const T* const* a, Index count, Index depth, const T* b, Index b_stride, T* c,
                                     Index c_stride, int vectors) {
    if constexpr (V == 4) {
      if (vectors == 4) return all_rows<rows_for<4>, 4, Add>(a, count, depth, b, b_stride, c, c_stride);
      if (vectors == 3) return all_rows<rows_for<3>, 3, Add>(a, count, depth, b, b_stride, c, c_stride);
    }
    if (vectors == 2) return all_rows<rows_for<2>, 2, Add>(a, count, depth, b, b_stride, c, c_stride);
    all_rows<rows_for<1>, 1, Add>(a, count, depth, b, b_stride, c, c_stride);
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

  /// transposed[column][lane] = rows[lane][column] * factor for `vectors` vectors of lanes and any rows of `columns`
  /// numbers; transposed has rows of `stride` numbers, and more of them up to a whole vector.
  static COTERIE_INLINE void gather_columns(const T* const* rows, int vectors, Index columns, T factor, T* transposed,
                                            Index stride) {
    for (int v = 0; v < vectors; ++v)
      for (Index c = 0; c < columns; c += lanes) {
        F square[lanes];
        if (c + lanes <= columns) {
          COTERIE_UNROLL for (int l = 0; l < lanes; ++l) L::load(rows[v * lanes + l] + c, square[l]);
        } else {
          alignas(64) T padded_rows[lanes * lanes] = {};
          for (int l = 0; l < lanes; ++l)
            for (Index i = c; i < columns; ++i) padded_rows[l * lanes + i - c] = rows[v * lanes + l][i];
          COTERIE_UNROLL for (int l = 0; l < lanes; ++l) L::load(padded_rows + l * lanes, square[l]);
        }
        COTERIE_UNROLL for (int l = 0; l < lanes; ++l) square[l] *= factor;
        L::transpose(square);
        COTERIE_UNROLL for (int l = 0; l < lanes; ++l) L::store(transposed + (c + l) * stride + v * lanes, square[l]);
      }
  }

  /// rows[lane][column] = transposed[column][lane] * factor[lane] for the first `count` lanes and any rows of `columns`
  /// numbers.
  static COTERIE_INLINE void scatter_columns(const T* transposed, const T* factor, int count, Index columns,
                                             T* const* rows) {
    for (int first = 0; first < count; first += lanes)
      for (Index c = 0; c < columns; c += lanes) {
        F square[lanes], scale;
        L::load(factor + first, scale);
        COTERIE_UNROLL for (int l = 0; l < lanes; ++l) {
          L::load(transposed + (c + l) * width + first, square[l]);
          square[l] *= scale;
        }
        L::transpose(square);
        if (c + lanes <= columns && first + lanes <= count) {
          COTERIE_UNROLL for (int l = 0; l < lanes; ++l) L::store(rows[first + l] + c, square[l]);
        } else {
          alignas(64) T padded_rows[lanes * lanes];
          COTERIE_UNROLL for (int l = 0; l < lanes; ++l) L::store(padded_rows + l * lanes, square[l]);
          for (int l = 0; l < lanes && first + l < count; ++l)
            for (Index i = c; i < (std::min)(columns, c + lanes); ++i)
              rows[first + l][i] = padded_rows[l * lanes + i - c];
        }
      }
  }

  /// s[key][lane] = sum_d keys[key][d] qt[d][lane], rows of `width` lanes.
  static COTERIE_INLINE void scores(const T* const* keys, Index count, Index depth, const T* qt, T* s, int vectors) {
    product<false>(keys, count, depth, qt, width, s, width, vectors);
  }

  /// to[key][c] += sum_l p[key][l] x[l][c] for padded rows of `columns` numbers.
  /// Checked: returns the first column of a strip of x that is not finite, otherwise `columns`; strips from there on
  /// are left alone.
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

  // out[c][v] += sum_j rows[j][c] p[j][v], c < Columns: rows by columns. False, and nothing stored, if checked and not
  // finite.
  template <int Columns, int N>
  static COTERIE_INLINE bool by_columns(const T* const* rows, Index begin, Index end, Index column, const T* p, T* out,
                                        bool checked) {
    F sum[Columns][N];
    COTERIE_UNROLL for (int c = 0; c < Columns; ++c) COTERIE_UNROLL for (int v = 0; v < N; ++v)
        L::load(out + c * width + v * lanes, sum[c][v]);
    for (Index j = begin; j < end; ++j) {
      const T* row = rows[j] + column;
      COTERIE_OPAQUE_ADDRESS(row);
      F x[N];
      COTERIE_UNROLL for (int v = 0; v < N; ++v) L::load(p + j * width + v * lanes, x[v]);
      COTERIE_UNROLL for (int c = 0; c < Columns; ++c) {
        const T y = row[c];
        COTERIE_UNROLL for (int v = 0; v < N; ++v) L::add_product(y, x[v], sum[c][v]);
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

  template <int N, bool Add>
  static COTERIE_INLINE void row_strips(const T* x, Index depth, const T* w, Index w_stride, T* y, Index vectors) {
    for (; vectors >= N; vectors -= N, w += N * lanes, y += N * lanes) by_rows<1, N, Add>(&x, depth, w, w_stride, y, 0);
    if constexpr (N > 1) row_strips<N / 2, Add>(x, depth, w, w_stride, y, vectors);
  }

  /// y[v] (+)= sum_l x[l] w[l][v] for any number of vectors: product() of one row, which has registers for longer
  /// pieces of w's.
  static COTERIE_INLINE void row_product(const T* x, Index depth, const T* w, Index w_stride, T* y, Index vectors,
                                         bool add) {
    if (add)
      row_strips<4 * V, true>(x, depth, w, w_stride, y, vectors);
    else
      row_strips<4 * V, false>(x, depth, w, w_stride, y, vectors);
  }

  // s[key] = sum_d q[d] rows[key][d] for N vectors of keys: keys are transposed a few columns at a time.
  template <int N>
  static COTERIE_INLINE void row_dots_of(const T* const* rows, Index depth, const T* q, T* s) {
    F sum[N];
    COTERIE_UNROLL for (int v = 0; v < N; ++v) sum[v] = F{};
    Index l = 0;
    for (; l + L::quarter <= depth; l += L::quarter) {
      F x[N][L::quarter];
      COTERIE_UNROLL for (int v = 0; v < N; ++v) L::load_columns(rows + v * lanes, l, x[v]);
      COTERIE_UNROLL for (int i = 0; i < L::quarter; ++i) COTERIE_UNROLL for (int v = 0; v < N; ++v)
          L::add_product(q[l + i], x[v][i], sum[v]);
    }
    for (; l < depth; ++l) COTERIE_UNROLL for (int v = 0; v < N; ++v) {
        alignas(64) T column[lanes];
        for (int i = 0; i < lanes; ++i) column[i] = rows[v * lanes + i][l];
        F x;
        L::load(column, x);
        L::add_product(q[l], x, sum[v]);
      }
    COTERIE_UNROLL for (int v = 0; v < N; ++v) L::store(s + v * lanes, sum[v]);
  }

  /// s[key] = sum_d q[d] rows[key][d] for `vectors` vectors of keys: row_product() of one query and transposed keys, of
  /// keys as they are.
  static COTERIE_INLINE void row_dots(const T* const* rows, Index depth, const T* q, T* s, int vectors) {
    int v = 0;
    for (; v + 2 <= vectors; v += 2) row_dots_of<2>(rows + v * lanes, depth, q, s + v * lanes);
    if (v < vectors) row_dots_of<1>(rows + v * lanes, depth, q, s + v * lanes);
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
        L::add_product(y, x, sum[v]);
      }
    }
    COTERIE_UNROLL for (int v = 0; v < N; ++v) L::store(out + column + v * lanes, sum[v]);
    total = all;
  }

  /// out[c] += sum over j in [begin, end) of p[j] rows[j][c], total += sum of p[j]: one query, lanes are columns.
  static COTERIE_INLINE void row_values(const T* p, const T* const* rows, Index begin, Index end, Index columns, T* out,
                                        T& total) {
    T again = 0;  // the sum of p runs beside the first strip's products; that of later strips is not used
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

  template <int Columns, int N>
  static COTERIE_INLINE Index all_columns(const T* const* rows, Index begin, Index end, Index c, Index columns,
                                          const T* p, T* out, bool checked) {
    for (; c + Columns <= columns; c += Columns)
      if (!by_columns<Columns, N>(rows, begin, end, c, p, out + c * width, checked)) return c;
    if constexpr (Columns > 1)
      return all_columns<fewer(Columns), N>(rows, begin, end, c, columns, p, out, checked);
    else
      return columns;
  }

  /// out[c][lane] += sum over j in [begin, end) of rows[j][c] p[j][lane], for `vectors` <= V vectors of rows of
  /// `width`.
  /// Checked: returns the first column not done, because a row with a non-finite number met it; otherwise `columns`.
  static COTERIE_INLINE Index columns(const T* const* rows, Index begin, Index end, Index columns, const T* p, T* out,
                                      int vectors, bool checked) {
    if constexpr (V == 4) {
      if (vectors == 4) return all_columns<columns_for<4>, 4>(rows, begin, end, 0, columns, p, out, checked);
      if (vectors == 3) return all_columns<columns_for<3>, 3>(rows, begin, end, 0, columns, p, out, checked);
    }
    if (vectors == 2) return all_columns<columns_for<2>, 2>(rows, begin, end, 0, columns, p, out, checked);
    return all_columns<columns_for<1>, 1>(rows, begin, end, 0, columns, p, out, checked);
  }
};

/// The micro-kernel of weight gradients: up to R rows by V vectors of sums in registers, both factors packed.
template <class T, int Bytes, int V, int R>
struct Strips {
  using L = Lanes<T, Bytes>;
  using F = typename L::F;
  static constexpr int lanes = L::count, width = lanes * V;

  // d_w[r][c] += sum_i x[i][r] d_y[i][c] for Rows rows and N vectors; x has rows of Rows numbers, d_y of `width`.
  template <int Rows, int N>
  static COTERIE_INLINE void strip(const T* x, const T* d_y, Index tokens, T* d_w, Index stride) {
    COTERIE_UNROLL for (int r = 0; r < Rows; ++r) __builtin_prefetch(d_w + r * stride, 1);
    F sum[Rows][N];
    COTERIE_UNROLL for (int r = 0; r < Rows; ++r) COTERIE_UNROLL for (int v = 0; v < N; ++v) sum[r][v] = F{};
    for (Index i = 0; i < tokens; ++i) {
      F y[N];
      COTERIE_UNROLL for (int v = 0; v < N; ++v) L::load(d_y + i * width + v * lanes, y[v]);
      COTERIE_UNROLL for (int r = 0; r < Rows; ++r) {
        const T factor = x[i * Rows + r];
        COTERIE_UNROLL for (int v = 0; v < N; ++v) L::add_product(factor, y[v], sum[r][v]);
      }
    }
    COTERIE_UNROLL for (int r = 0; r < Rows; ++r) COTERIE_UNROLL for (int v = 0; v < N; ++v) {
      F old;
      L::load(d_w + r * stride + v * lanes, old);
      old += sum[r][v];
      L::store(d_w + r * stride + v * lanes, old);
    }
  }

  // strip() of `rows` <= Rows rows.
  template <int Rows, int N>
  static COTERIE_INLINE void strip_rows(Index rows, const T* x, const T* d_y, Index tokens, T* d_w, Index stride) {
    if (rows == Rows) return strip<Rows, N>(x, d_y, tokens, d_w, stride);
    if constexpr (Rows > 1) strip_rows<Rows - 1, N>(rows, x, d_y, tokens, d_w, stride);
  }

  // All strips against N vectors of a panel.
  template <int N>
  static COTERIE_INLINE void all_strips(const T* strips, Index rows, const T* panel, Index tokens, T* d_w,
                                        Index stride) {
    Index r = 0;
    for (; r + R <= rows; r += R) strip<R, N>(strips + r * tokens, panel, tokens, d_w + r * stride, stride);
    if (r < rows) strip_rows<R - 1, N>(rows - r, strips + r * tokens, panel, tokens, d_w + r * stride, stride);
  }

  /// d_w[r][c] += sum_i x[i][r] d_y[i][c] for `rows` rows and `vectors` <= V vectors. x lies in strips of [token][R],
  /// the last one of as many rows as are left, d_y in rows of `width`. A sum runs over its tokens in order and is then
  /// added.
  static COTERIE_INLINE void run(const T* strips, Index rows, const T* panel, Index tokens, T* d_w, Index stride,
                                 int vectors) {
    if constexpr (V == 4) {
      if (vectors == 4) return all_strips<4>(strips, rows, panel, tokens, d_w, stride);
      if (vectors == 3) return all_strips<3>(strips, rows, panel, tokens, d_w, stride);
    }
    if (vectors == 2) return all_strips<2>(strips, rows, panel, tokens, d_w, stride);
    all_strips<1>(strips, rows, panel, tokens, d_w, stride);
  }
};

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
