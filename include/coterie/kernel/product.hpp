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

/// Panels of a task that packs.
inline constexpr Index packed_panels = 4;

/// Up to so many rows w is read in place: one pass over it, which packing would only double.
inline constexpr Index few_rows = 6;

/// y (+)= x m, with m = w or w^T packed into panels first.
template <class T>
void packed_product(ConstView<T> x, ConstView<T> w, bool transposed, View<T> y, Context& context, bool add) {
  const KernelTable<T>& kernel = kernels<T>(context.instructions());
  const Index depth = x.cols(), columns = y.cols(), width = kernel.panel_width;
  const Index panels = (columns + width - 1) / width;
  const bool in_place = !transposed && x.rows() <= few_rows && panels > 0;
  Arena& shared = context.workspace().shared();
  Arena::Scope scope(shared);
  T* packed = shared.template take<T>((in_place ? 1 : panels) * width * depth);
  if (in_place) {
    const Index last = (panels - 1) * width;
    if (columns % row_padding != 0)  // else whole vectors on every instruction set
      kernel.pack(PanelSource<T>{w.data() + last, w.stride(), false, depth, columns - last, 0, 1}, packed);
  } else {
    context.for_chunks(panels, packed_panels, [&](Index first, Index last, Index) {
      kernel.pack(PanelSource<T>{w.data(), w.stride(), transposed, depth, columns, first, last}, packed);
    });
  }
  context.for_chunks(x.rows(), product_rows, [&](Index first, Index last, Index) {
    ProductArguments<T> arguments{x.row(first), x.stride(), packed,  y.row(first), y.stride(),
                                  last - first, depth,      columns, add};
    if (in_place) arguments.w = w.data(), arguments.w_stride = w.stride();
    kernel.product(arguments);
  });
}

/// Chunks of the tokens of a weight gradient of `tiles` blocks: where these are few, partial sums make about eight tasks.
inline Index gradient_chunks(Index tokens, Index tiles) {
  return std::clamp(tokens / 1024, Index(1), (std::max)(Index(1), 8 / (std::max)(Index(1), tiles)));
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
/// Threads and determinism: tokens are summed in blocks, block after block, cut by the sizes alone, whatever the number of
///   workers.
/// Cost: 2 tokens in out operations.
template <class T>
void product_weight_gradient(ConstView<T> x, ConstView<T> d_y, View<T> d_w, Context& context) {
  detail::check_shape<T>("product_weight_gradient", "d_y", d_y, x.rows(), d_y.cols());
  detail::check_shape<T>("product_weight_gradient", "d_w", d_w, x.cols(), d_y.cols());
  detail::check_no_alias<T>("product_weight_gradient", "d_w", d_w, "x", x);
  detail::check_no_alias<T>("product_weight_gradient", "d_w", d_w, "d_y", d_y);
  const detail::KernelTable<T>& kernel = detail::kernels<T>(context.instructions());
  const Index n = x.rows(), in = d_w.rows(), out = d_w.cols(), width = kernel.panel_width;
  constexpr Index rows = detail::gradient_rows, columns = detail::gradient_columns;
  const Index row_blocks = (in + rows - 1) / rows, column_blocks = (out + columns - 1) / columns;
  const Index tiles = row_blocks * column_blocks, chunks = detail::gradient_chunks(n, tiles);
  const Index chunk_tokens = (n + chunks - 1) / chunks;
  Arena& shared = context.workspace().shared();
  Arena::Scope scope(shared);
  T* const partials = chunks > 1 ? shared.template take<T>((chunks - 1) * in * out) : nullptr;
  context.for_each(chunks * tiles, [&](Index task, Index worker) {
    const Index chunk = task / tiles;
    const Index row = task % tiles / column_blocks * rows, column = task % column_blocks * columns;
    // The first chunk adds into d_w itself.
    const View<T> sum = chunk > 0 ? View<T>(partials + (chunk - 1) * in * out, in, out) : d_w;
    detail::WeightGradientArguments<T> arguments;
    arguments.x_stride = x.stride();
    arguments.d_y_stride = d_y.stride();
    arguments.d_w = sum.row(row) + column;
    arguments.d_w_stride = sum.stride();
    arguments.rows = (std::min)(rows, in - row);
    arguments.columns = (std::min)(columns, out - column);
    if (chunk > 0)
      for (Index r = row; r < row + arguments.rows; ++r) std::fill_n(sum.row(r) + column, arguments.columns, T(0));
    Arena& arena = context.workspace().worker(worker);
    Arena::Scope task_scope(arena);
    arguments.scratch = arena.template take<T>(detail::gradient_scratch(arguments.columns, width));
    const Index last = (std::min)(n, (chunk + 1) * chunk_tokens);
    for (Index i = chunk * chunk_tokens; i < last; i += detail::gradient_tokens) {
      arguments.tokens = (std::min)(detail::gradient_tokens, last - i);
      arguments.x = x.row(i) + row;
      arguments.d_y = d_y.row(i) + column;
      kernel.weight_gradient(arguments);
    }
  });
  if (chunks > 1)
    context.for_chunks(in, 32, [&](Index first, Index last, Index) {
      for (Index r = first; r < last; ++r)
        for (Index chunk = 0; chunk < chunks - 1; ++chunk)
          for (Index c = 0; c < out; ++c) d_w(r, c) += partials[(chunk * in + r) * out + c];
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
  Arena& shared = context.workspace().shared();
  Arena::Scope scope(shared);
  const T** const rows = shared.template take<const T*>(centroids.rows());
  for (Index c = 0; c < centroids.rows(); ++c) rows[c] = centroids.row(c);
  context.for_chunks(x.rows(), 512, [&](Index first, Index last, Index worker) {
    Arena& arena = context.workspace().worker(worker);
    Arena::Scope task_scope(arena);
    kernel.nearest(detail::NearestArguments<T>{x.row(first), x.stride(), last - first, x.cols(), rows, centroids.rows(),
                                               labels.data() + first},
                   arena.template take<T>(kernel.nearest_scratch(x.cols())));
  });
}

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie
