// Dense products y = x w with w packed into panels.
//
// A panel is `width` columns of w, all `depth` rows of them, stored row after row: [panel][depth][width]. That is the
// order in which the micro-kernel reads it, so its loads are consecutive; zeros fill the last panel up to a whole
// vector. w^T is packed by transposing squares of lanes x lanes. Only w is packed: rows of x are broadcast number by
// number and read where they are.
//
// The walk, from the outside in: a task has product_rows rows of x (product.hpp); for each panel, for groups of 8 R of
// those rows, the micro-kernel runs over the whole depth for R rows by `width` columns, and keeps those sums in
// registers.
//
// Caches: the R rows of x and one row of the panel at a time come from the first level; a panel (depth x width numbers,
// 256 KiB of floats at depth 1024) stays in the second for all rows of a task; w as a whole streams from the third,
// once for each task.
//
// Sums are never cut along the depth: a number of y has the same bits whatever rows are computed with it.
//
// Start reading at Micro::by_rows, the loop that does the work, then product() below; the rest moves numbers to where
// they are read.
#pragma once

#include <algorithm>
#include <cstring>

#include "coterie/kernel/dispatch.hpp"

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
  // Not null: w itself, from which panels are read in place. Only a last panel that ends inside a vector is packed, and
  // is then all that `panels` holds.
  const T* w = nullptr;
  Index w_stride = 0;
};

inline namespace COTERIE_FLAGS_NAMESPACE {

/// Products in panels of `M::width` columns on the micro-kernels M.
template <class T, class M>
struct Panel {
  using L = typename M::L;
  using F = typename L::F;
  static constexpr int lanes = L::count, width = M::width, V = width / lanes, R = M::most_rows;
  static constexpr int pack_rows = 8;  // rows at a time while packing

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
  // column up to a whole vector or the row's end. A few rows at a time, and the next ones prefetched: rows a power of
  // two apart share a few sets of a cache, and so do blocks.
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

  // to[l][c] = rows[c][l] for `count` <= width rows of `depth` numbers; behind the last one lie zeros up to a whole
  // vector.
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

  /// Packs columns [panel * width, (panel + 1) * width) into panels[panel][depth][width], zeros behind the last column
  /// up to a whole vector.
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
};

COTERIE_KERNEL(PackKernel, Panel, pack, (const PanelSource<T>& source, T* panels), (source, panels))
COTERIE_KERNEL(ProductKernel, Panel, product, (const ProductArguments<T>& arguments), (arguments))

/// Columns of a panel.
template <class T>
Index panel_width(InstructionSet instructions) {
  return with_micro<T>(instructions, []<class M>(M) { return Index(M::width); });
}

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
