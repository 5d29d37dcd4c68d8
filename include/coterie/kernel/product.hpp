// Dense products y = x w, forward or backward.
#pragma once

#include <algorithm>

#include "coterie/core/context.hpp"
#include "coterie/kernel/panel.hpp"
#include "coterie/kernel/weight_gradient.hpp"

namespace coterie {
namespace detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

/// Rows of a task of a product: a multiple of every micro-kernel's rows (4 and 6), which reads a panel 16 times or
/// more; and few enough that 1024 tokens make eleven tasks.
inline constexpr Index product_rows = 96;

/// Panels of a task that packs: the rows of w are then read 4 panels, that is 256 numbers with AVX-512, at a time.
inline constexpr Index packed_panels = 4;

/// Up to so many rows w is read in place: one pass over it, which packing would only double.
inline constexpr Index few_rows = 6;

/// Numbers of w that a task of few rows reads: long beside what it costs to start one.
inline constexpr Index in_place_numbers = 1 << 17;

/// Columns of a task of few rows, in whole panels, 4 of which are what one pass over w reads at a time.
inline Index in_place_columns(Index depth, Index width) {
  const Index pass = packed_panels * width;
  return (std::max<Index>)(1, in_place_numbers / ((std::max<Index>)(1, depth) * pass)) * pass;
}

/// y (+)= x m, with m = w or w^T packed into panels first.
template <class T>
void packed_product(ConstView<T> x, ConstView<T> w, bool transposed, View<T> y, Context& context, bool add) {
  const auto pack = PackKernel<T>::on(context.instructions());
  const auto multiply = ProductKernel<T>::on(context.instructions());
  const Index depth = x.cols(), columns = y.cols(), width = panel_width<T>(context.instructions());
  const Index panels = (columns + width - 1) / width;
  const bool in_place = !transposed && x.rows() <= few_rows && panels > 0;
  Arena& shared = context.workspace().shared();
  Arena::Scope scope(shared);
  T* packed = shared.template take<T>((in_place ? 1 : panels) * width * depth);
  if (in_place) {
    const Index last = (panels - 1) * width;
    if (columns % row_padding != 0)  // else whole vectors on every instruction set
      pack(PanelSource<T>{w.data() + last, w.stride(), false, depth, columns - last, 0, 1}, packed);
  } else {
    context.for_chunks(panels, packed_panels, [&](Index first, Index last, Index) {
      pack(PanelSource<T>{w.data(), w.stride(), transposed, depth, columns, first, last}, packed);
    });
  }
  if (in_place) {
    context.for_chunks(columns, in_place_columns(depth, width), [&](Index first, Index last, Index) {
      ProductArguments<T> arguments{x.data(), x.stride(),   packed, y.data() + first, y.stride(), x.rows(),
                                    depth,    last - first, add};
      arguments.w = w.data() + first, arguments.w_stride = w.stride();
      multiply(arguments);
    });
    return;
  }
  context.for_chunks(x.rows(), product_rows, [&](Index first, Index last, Index) {
    multiply(ProductArguments<T>{x.row(first), x.stride(), packed, y.row(first), y.stride(), last - first, depth,
                                 columns, add});
  });
}

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace detail

inline namespace COTERIE_FLAGS_NAMESPACE {

/// y = x w, or y += x w.
/// Shapes: x tokens x in, w in x out, y tokens x out.
/// Requires: shapes that fit and no overlap, otherwise ShapeError.
/// Allocates: nothing after warm-up.
/// Threads and determinism: a row's bits depend on that row of x, on w and on the instruction set alone.
/// Cost: 2 tokens in out operations.
template <class T>
void product(ConstView<T> x, ConstView<T> w, View<T> y, Context& context, bool add = false) {
  detail::check_shape<T>("product", "w", w, x.cols(), w.cols());
  detail::check_shape<T>("product", "y", y, x.rows(), w.cols());
  detail::check_no_alias<T>("product", "y", y, "x", x);
  detail::check_no_alias<T>("product", "y", y, "w", w);
  detail::packed_product<T>(x, w, false, y, context, add);
}

/// d_x = d_y w^T, or d_x += d_y w^T: undoes y = x w for x.
/// Shapes: d_y tokens x out, w in x out, d_x tokens x in. The rest as product().
template <class T>
void product_input_gradient(ConstView<T> d_y, ConstView<T> w, View<T> d_x, Context& context, bool add = false) {
  detail::check_shape<T>("product_input_gradient", "w", w, w.rows(), d_y.cols());
  detail::check_shape<T>("product_input_gradient", "d_x", d_x, d_y.rows(), w.rows());
  detail::check_no_alias<T>("product_input_gradient", "d_x", d_x, "d_y", d_y);
  detail::check_no_alias<T>("product_input_gradient", "d_x", d_x, "w", w);
  detail::packed_product<T>(d_y, w, true, d_x, context, add);
}

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie
