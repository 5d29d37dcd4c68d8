// Gradients of weights: d_w += x^T d_y.
#pragma once

#include <algorithm>
#include <cstring>

#include "coterie/core/context.hpp"
#include "coterie/kernel/panel.hpp"

namespace coterie {
namespace detail {

/// The largest blocks of a weight gradient, 192 tokens by 264 rows by 512 columns.
///
/// Tokens: a strip of x, 192 x 6 numbers, and a panel of d_y, 192 x 16 with AVX2 and 192 x 64 with AVX-512, are read
/// from the first-level cache, or in floats nearly so (48 KiB). Rows: all strips of x, 192 x 264, stay in the
/// second-level cache; 264 is a multiple of 4 and 6, so strips are whole on every instruction set. Columns: 512 packed
/// ones use each packed strip of x again.
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

inline namespace COTERIE_FLAGS_NAMESPACE {

/// Weight gradients on the micro-kernels M.
template <class T, class M>
struct WeightGradient {
  static constexpr int lanes = M::lanes, width = M::width, R = M::most_rows;

  /// d_w[l][c] += sum_i x[i][l] d_y[i][c]
  static COTERIE_INLINE void run(const WeightGradientArguments<T>& arguments) {
    T* const strips = arguments.scratch;
    T* const sums = strips + gradient_rows * gradient_tokens;
    T* const panels = sums + gradient_rows * width;
    const Index n = arguments.tokens, stride = arguments.d_w_stride;
    Panel<T, M>::template pack_blocks<width>(arguments.d_y, arguments.d_y_stride, n, arguments.columns, width, panels);
    Panel<T, M>::template pack_blocks<R>(arguments.x, arguments.x_stride, n, arguments.rows, arguments.rows % R,
                                         strips);
    for (Index c = 0; c < arguments.columns; c += width) {
      const Index columns = std::min<Index>(width, arguments.columns - c);
      if (columns % lanes == 0) {
        M::strips(strips, arguments.rows, panels + c * n, n, arguments.d_w + c, stride,
                  Panel<T, M>::vectors_of(columns));
        continue;
      }
      // What ends inside a vector goes through a buffer of whole vectors.
      std::memset(sums, 0, arguments.rows * width * sizeof(T));
      M::strips(strips, arguments.rows, panels + c * n, n, sums, width, Panel<T, M>::vectors_of(columns));
      for (Index r = 0; r < arguments.rows; ++r)
        for (Index k = 0; k < columns; ++k) arguments.d_w[r * stride + c + k] += sums[r * width + k];
    }
  }
};

COTERIE_KERNEL(WeightGradientKernel, WeightGradient, run, (const WeightGradientArguments<T>& arguments), (arguments))

/// Chunks of the tokens of a weight gradient of `tiles` blocks: where these are few, partial sums make about eight
/// tasks.
inline Index gradient_chunks(Index tokens, Index tiles) {
  return std::clamp(tokens / 1024, Index(1), (std::max)(Index(1), 8 / (std::max)(Index(1), tiles)));
}

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace detail

inline namespace COTERIE_FLAGS_NAMESPACE {

/// d_w += x^T d_y: undoes y = x w for w.
/// Shapes: x tokens x in, d_y tokens x out, d_w in x out.
/// Requires: shapes that fit and no overlap, otherwise ShapeError.
/// Threads and determinism: tokens are summed in blocks, block after block, cut by the sizes alone, whatever the number
///   of workers.
/// Cost: 2 tokens in out operations.
template <class T>
void product_weight_gradient(ConstView<T> x, ConstView<T> d_y, View<T> d_w, Context& context) {
  detail::check_shape<T>("product_weight_gradient", "d_y", d_y, x.rows(), d_y.cols());
  detail::check_shape<T>("product_weight_gradient", "d_w", d_w, x.cols(), d_y.cols());
  detail::check_no_alias<T>("product_weight_gradient", "d_w", d_w, "x", x);
  detail::check_no_alias<T>("product_weight_gradient", "d_w", d_w, "d_y", d_y);
  const auto kernel = detail::WeightGradientKernel<T>::on(context.instructions());
  const Index n = x.rows(), in = d_w.rows(), out = d_w.cols(), width = detail::panel_width<T>(context.instructions());
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
      kernel(arguments);
    }
  });
  if (chunks > 1)
    context.for_chunks(in, 32, [&](Index first, Index last, Index) {
      for (Index r = first; r < last; ++r)
        for (Index chunk = 0; chunk < chunks - 1; ++chunk)
          for (Index c = 0; c < out; ++c) d_w(r, c) += partials[(chunk * in + r) * out + c];
    });
}

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie
