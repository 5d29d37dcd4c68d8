// Dense products and nearest centroids on the micro-kernels.
#pragma once

#include <algorithm>
#include <cstring>

#include "coterie/kernel/arguments.hpp"
#include "coterie/kernel/micro.hpp"

namespace coterie::detail {

/// Rows of a matrix, or columns of its transpose.
template <class T>
struct PanelSource {
  const T* w = nullptr;
  Index stride = 0;
  bool transposed = false;  // the panels hold w^T
  Index depth = 0;          // terms of a sum
  Index columns = 0;        // of the panels together
  Index panel_begin = 0, panel_end = 0;
};

/// Rows of y = x w with w packed into panels of [depth][width].
template <class T>
struct ProductArguments {
  const T* x = nullptr;
  Index x_stride = 0;
  const T* panels = nullptr;
  T* y = nullptr;
  Index y_stride = 0;
  Index rows = 0, depth = 0, columns = 0;
  bool add = false;
  // Not null: w itself, of which all panels but the last are read, if that ends inside a vector. Then `panels` holds only this one.
  const T* w = nullptr;
  Index w_stride = 0;
};

/// The largest blocks of a weight gradient: a strip of x and a panel of d_y stay in the first-level cache, all strips in the
/// second. Rows are whole strips on every instruction set.
inline constexpr Index gradient_tokens = 192, gradient_rows = 264, gradient_columns = 512;

/// Numbers of scratch memory of a weight gradient in panels of `width`.
constexpr Index gradient_scratch(Index columns, Index width) {
  return gradient_tokens * (gradient_rows + (columns + width - 1) / width * width) + gradient_rows * width;
}

/// d_w += x^T d_y for a block of tokens, rows and columns of d_w.
template <class T>
struct WeightGradientArguments {
  const T* x = nullptr;
  Index x_stride = 0;
  const T* d_y = nullptr;
  Index d_y_stride = 0;
  T* d_w = nullptr;
  Index d_w_stride = 0;
  Index tokens = 0, rows = 0, columns = 0;
  T* scratch = nullptr;  // of gradient_scratch()
};

/// Rows of x and the number of their nearest centroid.
template <class T>
struct NearestArguments {
  const T* x = nullptr;
  Index x_stride = 0;
  Index rows = 0, d = 0;
  const T* const* centroids = nullptr;  // a pointer to each
  Index clusters = 0;
  std::int32_t* labels = nullptr;
};

inline namespace COTERIE_FLAGS_NAMESPACE {

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

  /// d_w[r][c] += sum_i x[i][r] d_y[i][c] for `rows` rows and `vectors` <= V vectors. x lies in strips of [token][R], the
  /// last one of as many rows as are left, d_y in rows of `width`. A sum runs over its tokens in order and is then added.
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

/// Products in panels of `M::width` columns on the micro-kernels M.
template <class T, class M>
struct Panel {
  using L = typename M::L;
  using F = typename L::F;
  using Ints = typename L::Ints;
  static constexpr int lanes = L::count, width = M::width, V = width / lanes, R = M::most_rows;
  static constexpr int centroid_block = 64, pack_rows = 8;

  static COTERIE_INLINE int vectors_of(Index columns) {
    return static_cast<int>(((columns < width ? columns : Index(width)) + lanes - 1) / lanes);
  }

  template <int Step>
  static COTERIE_INLINE void copy_block(const T* from, T* to) {
    if constexpr (Step % lanes == 0) COTERIE_UNROLL for (int c = 0; c < Step; c += lanes) {
        F x;
        L::load(from + c, x);
        L::store(to + c, x);
      }
    else
      std::memcpy(to, from, Step * sizeof(T));
  }

  // Copies rows of `columns` numbers into blocks of [row][Step], the last one of [row][tail] with zeros behind the last
  // column up to a whole vector or the row's end. A few rows at a time, and the next ones asked for: rows a power of two
  // apart share a few sets of a cache, and so do blocks.
  template <int Step>
  static COTERIE_INLINE void pack_blocks(const T* from, Index stride, Index rows, Index columns, Index tail, T* to) {
    const Index whole = columns / Step * Step, left = columns - whole;
    const Index filled = (std::min)(tail, (left + lanes - 1) / lanes * lanes);
    for (Index first = 0; first < rows; first += pack_rows) {
      const Index last = std::min<Index>(first + pack_rows, rows);
      for (Index c = 0; c < whole; c += Step)
        for (Index i = first; i < last; ++i) {
          __builtin_prefetch(from + (i + pack_rows) * stride + c);
          copy_block<Step>(from + i * stride + c, to + c * rows + i * Step);
        }
      for (Index i = first; i < last; ++i) {
        T* const end = to + whole * rows + i * tail;
        for (Index c = 0; c < left; ++c) end[c] = from[i * stride + whole + c];
        for (Index c = left; c < filled; ++c) end[c] = 0;
      }
    }
  }

  // to[l][c] = rows[c][l] for `count` <= width rows of `depth` numbers; behind the last one lie zeros up to a whole vector.
  static COTERIE_INLINE void pack_transposed(const T* rows, Index stride, Index count, Index depth, T* to) {
    const Index squares = count / lanes * lanes, whole = depth / lanes * lanes;
    M::transpose_in(rows, stride, static_cast<int>(count / lanes), whole, to);
    for (Index l = whole; l < depth; ++l)
      for (Index c = 0; c < squares; ++c) to[l * width + c] = rows[c * stride + l];
    for (Index c = squares; c < count; ++c)
      for (Index l = 0; l < depth; ++l) to[l * width + c] = rows[c * stride + l];
    for (Index c = count; c % lanes != 0; ++c)
      for (Index l = 0; l < depth; ++l) to[l * width + c] = 0;
  }

  /// Packs columns [panel * width, (panel + 1) * width) into panels[panel][depth][width], zeros behind the last column up
  /// to a whole vector.
  static COTERIE_INLINE void pack(const PanelSource<T>& source, T* panels) {
    const Index begin = source.panel_begin * width, end = (std::min)(source.panel_end * width, source.columns);
    T* const to = panels + begin * source.depth;
    if (!source.transposed)
      return pack_blocks<width>(source.w + begin, source.stride, source.depth, end - begin, width, to);
    for (Index c = begin; c < end; c += width)
      pack_transposed(source.w + c * source.stride, source.stride, std::min<Index>(width, end - c), source.depth,
                      panels + c * source.depth);
  }

  /// y[i][c] (+)= sum_l x[i][l] w[l][c]
  static COTERIE_INLINE void product(const ProductArguments<T>& arguments) {
    constexpr int group = 8 * R;
    const T* rows[group];
    alignas(64) T tail[group * width];
    Index first = 0;
    if (arguments.w && arguments.rows == 1) {
      first = arguments.columns % lanes == 0 ? arguments.columns : arguments.columns / width * width;
      M::row_product(arguments.x, arguments.depth, arguments.w, arguments.w_stride, arguments.y, first / lanes,
                     arguments.add);
    }
    for (; first < arguments.columns; first += width) {
      const Index count = std::min<Index>(width, arguments.columns - first);
      const bool whole = count % lanes == 0, in_place = arguments.w && whole;
      const T* const panel =
          in_place ? arguments.w + first : arguments.panels + (arguments.w ? 0 : first * arguments.depth);
      const Index panel_stride = in_place ? arguments.w_stride : Index(width);
      for (Index i = 0; i < arguments.rows; i += group) {
        const Index n = std::min<Index>(group, arguments.rows - i);
        for (Index r = 0; r < n; ++r) rows[r] = arguments.x + (i + r) * arguments.x_stride;
        T* const y = arguments.y + i * arguments.y_stride + first;
        // What ends inside a vector goes through a buffer of whole vectors.
        T* const to = whole ? y : tail;
        const Index stride = whole ? arguments.y_stride : Index(width);
        if (!whole && arguments.add)
          for (Index r = 0; r < n; ++r)
            for (Index c = 0; c < width; ++c) tail[r * width + c] = c < count ? y[r * arguments.y_stride + c] : T(0);
        M::products(rows, n, arguments.depth, panel, panel_stride, to, stride, vectors_of(count), arguments.add);
        if (!whole)
          for (Index r = 0; r < n; ++r)
            for (Index c = 0; c < count; ++c) y[r * arguments.y_stride + c] = tail[r * width + c];
      }
    }
  }

  /// d_w[l][c] += sum_i x[i][l] d_y[i][c]
  static COTERIE_INLINE void weight_gradient(const WeightGradientArguments<T>& arguments) {
    T* const strips = arguments.scratch;
    T* const sums = strips + gradient_rows * gradient_tokens;
    T* const panels = sums + gradient_rows * width;
    const Index n = arguments.tokens, stride = arguments.d_w_stride;
    pack_blocks<width>(arguments.d_y, arguments.d_y_stride, n, arguments.columns, width, panels);
    pack_blocks<R>(arguments.x, arguments.x_stride, n, arguments.rows, arguments.rows % R, strips);
    for (Index c = 0; c < arguments.columns; c += width) {
      const Index columns = std::min<Index>(width, arguments.columns - c);
      if (columns % lanes == 0) {
        M::strips(strips, arguments.rows, panels + c * n, n, arguments.d_w + c, stride, vectors_of(columns));
        continue;
      }
      // What ends inside a vector goes through a buffer of whole vectors.
      std::memset(sums, 0, arguments.rows * width * sizeof(T));
      M::strips(strips, arguments.rows, panels + c * n, n, sums, width, vectors_of(columns));
      for (Index r = 0; r < arguments.rows; ++r)
        for (Index k = 0; k < columns; ++k) arguments.d_w[r * stride + c + k] += sums[r * width + k];
    }
  }

  static constexpr Index nearest_scratch(Index d) { return (d + centroid_block) * width; }

  // best, label = the largest of these scores and where it was, for N vectors of lanes; number: of the first centroid.
  template <int N>
  static COTERIE_INLINE void largest(const T* scores, Index count, Index number, F* best, Ints* label) {
    F b[N];
    Ints l[N], j = Ints{} + static_cast<typename L::Integer>(number);
    COTERIE_UNROLL for (int v = 0; v < N; ++v) b[v] = best[v], l[v] = label[v];
    for (const T* const end = scores + count * width; scores < end; scores += width, j += 1)
      COTERIE_UNROLL for (int v = 0; v < N; ++v) {
        F s;
        L::load(scores + v * lanes, s);
        const Ints better = s > b[v];
        b[v] = better ? s : b[v];
        l[v] = better ? j : l[v];
      }
    COTERIE_UNROLL for (int v = 0; v < N; ++v) best[v] = b[v], label[v] = l[v];
  }

  /// The number of the centroid nearest to x: lanes are centroids.
  static COTERIE_INLINE std::int32_t nearest_of(const NearestArguments<T>& arguments, const T* x, T* scores) {
    const T* rows[centroid_block];
    Index label = 0;
    T best = 0;
    for (Index c = 0; c < arguments.clusters; c += centroid_block) {
      const Index n = std::min<Index>(centroid_block, arguments.clusters - c), vectors = (n + lanes - 1) / lanes;
      for (Index j = 0; j < vectors * lanes; ++j) rows[j] = arguments.centroids[c + (std::min)(j, n - 1)];
      M::row_dots(rows, arguments.d, x, scores, static_cast<int>(vectors));
      if (c == 0) best = scores[0];
      for (Index j = 0; j < n; ++j)
        if (scores[j] > best) best = scores[j], label = c + j;
    }
    return static_cast<std::int32_t>(label);
  }

  /// labels[i] = argmax_c x_i . centroids_c: lanes are rows of x, if there are several, and centroids are broadcast.
  static COTERIE_INLINE void nearest(const NearestArguments<T>& arguments, T* scratch) {
    if (arguments.rows == 1) {
      *arguments.labels = nearest_of(arguments, arguments.x, scratch);
      return;
    }
    T *const x = scratch, *const scores = scratch + arguments.d * width;
    for (Index first = 0; first < arguments.rows; first += width) {
      const Index count = std::min<Index>(width, arguments.rows - first);
      const int vectors = vectors_of(count);
      pack_transposed(arguments.x + first * arguments.x_stride, arguments.x_stride, count, arguments.d, x);
      // The next rows are on their way while these are compared: heads lie side by side, so rows are far apart.
      for (Index l = first + width; l < (std::min)(first + 2 * width, arguments.rows); ++l)
        L::fetch(arguments.x + l * arguments.x_stride, arguments.d);
      F best[V];
      Ints label[V];
      for (Index c = 0; c < arguments.clusters; c += centroid_block) {
        const Index n = std::min<Index>(centroid_block, arguments.clusters - c);
        M::scores(arguments.centroids + c, n, arguments.d, x, scores, vectors);
        if (c == 0)
          for (int v = 0; v < vectors; ++v) {
            L::load(scores + v * lanes, best[v]);
            label[v] = Ints{};
          }
        if (vectors == V)
          largest<V>(scores, n, c, best, label);
        else
          for (int v = 0; v < vectors; ++v) largest<1>(scores + v * lanes, n, c, best + v, label + v);
      }
      for (Index l = 0; l < count; ++l)
        arguments.labels[first + l] = static_cast<std::int32_t>(label[l / lanes][l % lanes]);
    }
  }
};

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
