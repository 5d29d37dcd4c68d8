// Dense products and nearest centroids on the micro-kernels.
#pragma once

#include <algorithm>
#include <cstring>

#include "coterie/kernel/micro.hpp"
#include "coterie/kernel/part.hpp"

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
struct ProductPart {
  const T* x = nullptr;
  Index x_stride = 0;
  const T* panels = nullptr;
  T* y = nullptr;
  Index y_stride = 0;
  Index rows = 0, depth = 0, columns = 0;
  bool add = false;
};

/// A strip of d_w += x^T d_y: columns [column, column + columns), rows [row_begin, row_end) of d_w.
template <class T>
struct WeightGradientPart {
  const T* x = nullptr;
  Index x_stride = 0;
  const T* d_y = nullptr;
  Index d_y_stride = 0;
  T* d_w = nullptr;
  Index d_w_stride = 0;
  Index tokens = 0, row_begin = 0, row_end = 0, column = 0, columns = 0;
};

/// Rows of x and the number of their nearest centroid.
template <class T>
struct NearestPart {
  const T* x = nullptr;
  Index x_stride = 0;
  Index rows = 0, d = 0;
  const T* centroids = nullptr;
  Index centroid_stride = 0;
  Index clusters = 0;
  std::int32_t* labels = nullptr;
};

inline namespace COTERIE_FLAGS_NAMESPACE {

/// Products in panels of `M::width` columns on the micro-kernels M.
template <class T, class M>
struct Panel {
  using L = typename M::L;
  using F = typename L::F;
  using I = typename L::I;
  static constexpr int lanes = L::count, width = M::width, V = width / lanes, R = M::most_rows;
  static constexpr int tokens_block = 256, centroid_block = 64;

  /// Packs columns [panel * width, (panel + 1) * width) into panels[panel][depth][width], zeros behind the last column.
  static COTERIE_INLINE void pack(const PanelSource<T>& source, T* panels) {
    for (Index panel = source.panel_begin; panel < source.panel_end; ++panel) {
      T* to = panels + panel * source.depth * width;
      const Index first = panel * width, count = std::min<Index>(width, source.columns - first);
      for (Index l = 0; l < source.depth; ++l, to += width) {
        for (Index c = 0; c < count; ++c)
          to[c] =
              source.transposed ? source.w[(first + c) * source.stride + l] : source.w[l * source.stride + first + c];
        for (Index c = count; c < width; ++c) to[c] = 0;
      }
    }
  }

  /// y[i][c] (+)= sum_l x[i][l] w[l][c]
  static COTERIE_INLINE void product(const ProductPart<T>& part) {
    constexpr int group = 8 * R;
    const T* rows[group];
    alignas(64) T tail[group * width];
    for (Index first = 0; first < part.columns; first += width) {
      const T* panel = part.panels + first * part.depth;
      const Index count = std::min<Index>(width, part.columns - first);
      for (Index i = 0; i < part.rows; i += group) {
        const Index n = std::min<Index>(group, part.rows - i);
        for (Index r = 0; r < n; ++r) rows[r] = part.x + (i + r) * part.x_stride;
        T* y = part.y + i * part.y_stride + first;
        // The last panel goes through a buffer of whole vectors.
        T* to = count == width ? y : tail;
        const Index stride = count == width ? part.y_stride : Index(width);
        if (to == tail && part.add)
          for (Index r = 0; r < n; ++r)
            for (Index c = 0; c < width; ++c) tail[r * width + c] = c < count ? y[r * part.y_stride + c] : T(0);
        if (part.add)
          M::template product<true>(rows, n, part.depth, panel, width, to, stride, V);
        else
          M::template product<false>(rows, n, part.depth, panel, width, to, stride, V);
        if (to == tail)
          for (Index r = 0; r < n; ++r)
            for (Index c = 0; c < count; ++c) y[r * part.y_stride + c] = tail[r * width + c];
      }
    }
  }

  /// d_w[l][c] += sum_i x[i][l] d_y[i][c], summed in blocks of tokens, block after block.
  static COTERIE_INLINE void weight_gradient(const WeightGradientPart<T>& part) {
    constexpr int group = 4 * R;
    const T* rows[tokens_block];
    alignas(64) T d_y[tokens_block * width];
    alignas(64) T sum[group * width];
    for (Index i = 0; i < part.tokens; i += tokens_block) {
      const Index n = std::min<Index>(tokens_block, part.tokens - i);
      for (Index r = 0; r < n; ++r) {
        const T* from = part.d_y + (i + r) * part.d_y_stride + part.column;
        for (Index c = 0; c < width; ++c) d_y[r * width + c] = c < part.columns ? from[c] : T(0);
      }
      for (Index row = part.row_begin; row < part.row_end; row += group) {
        const Index count = std::min<Index>(group, part.row_end - row);
        for (Index r = 0; r < n; ++r) rows[r] = part.x + (i + r) * part.x_stride + row;
        std::memset(sum, 0, sizeof sum);
        M::columns(rows, 0, n, count, d_y, sum, V, false);
        for (Index r = 0; r < count; ++r)
          for (Index c = 0; c < part.columns; ++c)
            part.d_w[(row + r) * part.d_w_stride + part.column + c] += sum[r * width + c];
      }
    }
  }

  static constexpr Index nearest_scratch(Index d) { return 2 * padded(d) * width; }

  /// labels[i] = argmax_c x_i . centroids_c: lanes are rows of x, centroids are broadcast.
  static COTERIE_INLINE void nearest(const NearestPart<T>& part, T* scratch) {
    const Index stride = padded(part.d);
    T* x_rows = scratch;
    T* x = scratch + stride * width;
    alignas(64) T scores[centroid_block * width];
    const T* rows[centroid_block];
    for (Index first = 0; first < part.rows; first += width) {
      const Index count = std::min<Index>(width, part.rows - first);
      const int vectors = static_cast<int>((count + lanes - 1) / lanes);
      for (Index l = 0; l < vectors * lanes; ++l)
        for (Index c = 0; c < stride; ++c)
          x_rows[l * stride + c] = l < count && c < part.d ? part.x[(first + l) * part.x_stride + c] : T(0);
      M::transpose_in(x_rows, stride, vectors, part.d, x);
      F best[V];
      I label[V];
      for (Index c = 0; c < part.clusters; c += centroid_block) {
        const Index n = std::min<Index>(centroid_block, part.clusters - c);
        for (Index j = 0; j < n; ++j) rows[j] = part.centroids + (c + j) * part.centroid_stride;
        M::scores(rows, n, part.d, x, scores, vectors);
        for (int v = 0; v < vectors; ++v)
          for (Index j = 0; j < n; ++j) {
            F s;
            L::load(scores + j * width + v * lanes, s);
            if (c + j == 0) {
              best[v] = s;
              label[v] = I{};
              continue;
            }
            const I better = s > best[v];
            best[v] = better ? s : best[v];
            label[v] = better ? I{} + static_cast<typename L::Integer>(c + j) : label[v];
          }
      }
      for (Index l = 0; l < count; ++l) part.labels[first + l] = static_cast<std::int32_t>(label[l / lanes][l % lanes]);
    }
  }
};

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
