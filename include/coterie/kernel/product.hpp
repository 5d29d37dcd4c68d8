// Dense products of the layer and the router: projections, their gradients, and nearest centroids.
#pragma once

#include <algorithm>
#include <span>

#include "coterie/core/context.hpp"
#include "coterie/kernel/dispatch.hpp"

namespace coterie {
namespace detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

/// Rows of a task of a product.
inline constexpr Index product_rows = 96;

/// y (+)= x m, with m = w or w^T packed into panels first.
template <class T>
void packed_product(ConstView<T> x, ConstView<T> w, bool transposed, View<T> y, Context& context, bool add) {
  const KernelTable<T>& kernel = kernels<T>(context.instructions());
  const Index depth = x.cols(), columns = y.cols();
  const Index panels = (columns + kernel.panel_width - 1) / kernel.panel_width;
  Arena& shared = context.workspace().shared();
  Arena::Scope scope(shared);
  T* packed = shared.template take<T>(panels * kernel.panel_width * depth);
  context.for_each(panels, [&](Index i, Index) {
    kernel.pack(PanelSource<T>{w.data(), w.stride(), transposed, depth, columns, i, i + 1}, packed);
  });
  context.for_chunks(x.rows(), product_rows, [&](Index first, Index last, Index) {
    kernel.product(
        ProductPart<T>{x.row(first), x.stride(), packed, y.row(first), y.stride(), last - first, depth, columns, add});
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

/// d_w += x^T d_y: undoes y = x w for w.
/// Shapes: x tokens x in, d_y tokens x out, d_w in x out.
/// Requires: shapes that fit and no overlap, otherwise ShapeError.
/// Threads and determinism: tokens are summed in blocks, block after block, whatever the number of workers.
/// Cost: 2 tokens in out operations.
template <class T>
void product_weight_gradient(ConstView<T> x, ConstView<T> d_y, View<T> d_w, Context& context) {
  detail::check_shape<T>("product_weight_gradient", "d_y", d_y, x.rows(), d_y.cols());
  detail::check_shape<T>("product_weight_gradient", "d_w", d_w, x.cols(), d_y.cols());
  detail::check_no_alias<T>("product_weight_gradient", "d_w", d_w, "x", x);
  detail::check_no_alias<T>("product_weight_gradient", "d_w", d_w, "d_y", d_y);
  const detail::KernelTable<T>& kernel = detail::kernels<T>(context.instructions());
  const Index width = kernel.panel_width, panels = (d_w.cols() + width - 1) / width;
  constexpr Index rows = 192;
  const Index row_blocks = (d_w.rows() + rows - 1) / rows;
  context.for_each(panels * row_blocks, [&](Index i, Index) {
    const Index column = i / row_blocks * width, row = i % row_blocks * rows;
    kernel.weight_gradient(detail::WeightGradientPart<T>{x.data(), x.stride(), d_y.data(), d_y.stride(), d_w.data(),
                                                         d_w.stride(), x.rows(), row, std::min(row + rows, d_w.rows()),
                                                         column, std::min(width, d_w.cols() - column)});
  });
}

/// labels[i] = argmax over c of x_i . centroids_c; the lowest c wins ties.
/// Shapes: x tokens x d, centroids clusters x d (at least one), labels tokens.
/// Requires: shapes that fit, otherwise ShapeError.
/// Threads and determinism: a label depends on that row, the centroids and the instruction set alone.
/// Cost: 2 tokens clusters d operations.
template <class T>
void nearest_centroids(ConstView<T> x, ConstView<T> centroids, std::span<std::int32_t> labels, Context& context) {
  if (centroids.rows() < 1)
    detail::fail<ShapeError>("nearest_centroids", "centroids", "at least 1 row", centroids.rows());
  detail::check_shape<T>("nearest_centroids", "x", x, x.rows(), centroids.cols());
  detail::check_shape<T>("nearest_centroids", "centroids", centroids, centroids.rows(), centroids.cols());
  if (Index(labels.size()) != x.rows())
    detail::fail<ShapeError>("nearest_centroids", "labels", detail::join(x.rows(), " labels"), labels.size());
  const detail::KernelTable<T>& kernel = detail::kernels<T>(context.instructions());
  context.for_chunks(x.rows(), 512, [&](Index first, Index last, Index worker) {
    Arena& arena = context.workspace().worker(worker);
    Arena::Scope scope(arena);
    kernel.nearest(detail::NearestPart<T>{x.row(first), x.stride(), last - first, x.cols(), centroids.data(),
                                          centroids.stride(), centroids.rows(), labels.data() + first},
                   arena.template take<T>(kernel.nearest_scratch(x.cols())));
  });
}

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie
