// Row by row steps of a layer: the causal convolution of induction queries, biases, sums over rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "coterie/core/context.hpp"
#include "coterie/kernel/lanes.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

/// Calls f(first, last, task, worker) for chunks of `size` rows; where they are cut does not depend on the workers.
template <class F>
void for_chunks(Context& context, Index rows, Index size, F&& f) {
  context.for_each((rows + size - 1) / size,
                   [&](Index task, Index worker) { f(task * size, std::min(rows, (task + 1) * size), task, worker); });
}

/// Rows of a task that works row by row.
inline constexpr Index chunk_rows = 128;

/// Rows of a partial sum over all rows: at most 64 partial sums, however many rows there are.
inline Index partial_rows(Index rows) { return std::max(Index(512), (rows + 63) / 64); }

/// m = value, row by row.
template <class T>
void fill_rows(View<T> m, T value, Context& context) {
  for_chunks(context, m.rows(), chunk_rows, [&](Index first, Index last, Index, Index) {
    for (Index i = first; i < last; ++i) std::fill(m.row(i), m.row(i) + m.cols(), value);
  });
}

/// m += other.
template <class T>
void add_rows(View<T> m, ConstView<T> other, Context& context) {
  for_chunks(context, m.rows(), chunk_rows, [&](Index first, Index last, Index, Index) {
    for (Index i = first; i < last; ++i) {
      T* const to = m.row(i);
      const T* const from = other.row(i);
      for (Index j = 0; j < m.cols(); ++j) to[j] += from[j];
    }
  });
}

/// m_i += bias, a row of the same width.
template <class T>
void add_bias(View<T> m, const T* bias, Context& context) {
  for_chunks(context, m.rows(), chunk_rows, [&](Index first, Index last, Index, Index) {
    for (Index i = first; i < last; ++i) {
      T* const to = m.row(i);
      for (Index j = 0; j < m.cols(); ++j) to[j] += bias[j];
    }
  });
}

/// Sums over rows in a fixed order: f(partial, first, last) adds the rows [first, last) into a zeroed partial of `size`
/// numbers; all partials are then added to `sum` in row order.
template <class T, class F>
void sum_over_rows(Index rows, Index size, T* sum, Context& context, F&& f) {
  Arena& arena = context.workspace().shared();
  Arena::Scope scope(arena);
  const Index chunk = partial_rows(rows), partials = (rows + chunk - 1) / chunk;
  T* const all = arena.take<T>(partials * size);
  for_chunks(context, rows, chunk, [&](Index first, Index last, Index task, Index) {
    T* const partial = all + task * size;
    std::fill(partial, partial + size, T(0));
    f(partial, first, last);
  });
  for (Index p = 0; p < partials; ++p)
    for (Index j = 0; j < size; ++j) sum[j] += all[p * size + j];
}

/// d_bias += sum_i d_m_i: undoes add_bias for the bias.
template <class T>
void add_bias_backward(ConstView<T> d_m, T* d_bias, Context& context) {
  sum_over_rows(d_m.rows(), d_m.cols(), d_bias, context, [&](T* partial, Index first, Index last) {
    for (Index i = first; i < last; ++i)
      for (Index j = 0; j < d_m.cols(); ++j) partial[j] += d_m(i, j);
  });
}

/// A causal depth-wise convolution of every head within its sequence.
///
/// Shapes: x, y n x heads*d; taps heads*count x d, row h*count + t; positions n, a row's place in its sequence.
/// Formula: y_ih = sum over t < count, t <= position_i of taps_ht * x_(i-t)h, element by element, t ascending.
/// Overwrites y.
template <class T>
void convolve(ConstView<T> x, ConstView<T> taps, Index count, std::span<const std::int32_t> positions, View<T> y,
              Context& context) {
  const Index d = taps.cols(), heads = x.cols() / d;
  for_chunks(context, x.rows(), chunk_rows, [&](Index first, Index last, Index, Index) {
    for (Index i = first; i < last; ++i) {
      const Index reach = std::min(count, Index(positions[static_cast<std::size_t>(i)]) + 1);
      for (Index h = 0; h < heads; ++h) {
        T* const to = y.row(i) + h * d;
        std::fill(to, to + d, T(0));
        for (Index t = 0; t < reach; ++t) {
          const T *const tap = taps.row(h * count + t), *const from = x.row(i - t) + h * d;
          for (Index j = 0; j < d; ++j) to[j] += tap[j] * from[j];
        }
      }
    }
  });
}

/// Undoes convolve. Overwrites d_x; adds into d_taps.
template <class T>
void convolve_backward(ConstView<T> x, ConstView<T> taps, Index count, std::span<const std::int32_t> positions,
                       ConstView<T> d_y, View<T> d_x, View<T> d_taps, Context& context) {
  const Index n = x.rows(), d = taps.cols(), heads = x.cols() / d;
  // y_(i+t) += taps_t x_i:  d_x_i = sum_t taps_t d_y_(i+t), over the rows that lie in the same sequence
  for_chunks(context, n, chunk_rows, [&](Index first, Index last, Index, Index) {
    for (Index i = first; i < last; ++i)
      for (Index h = 0; h < heads; ++h) {
        T* const to = d_x.row(i) + h * d;
        std::fill(to, to + d, T(0));
        for (Index t = 0; t < count && i + t < n && positions[static_cast<std::size_t>(i + t)] >= t; ++t) {
          const T *const tap = taps.row(h * count + t), *const from = d_y.row(i + t) + h * d;
          for (Index j = 0; j < d; ++j) to[j] += tap[j] * from[j];
        }
      }
  });
  // y_i += taps_t x_(i-t):  d_taps_t = sum_i d_y_i x_(i-t)
  sum_over_rows(n, d_taps.rows() * d, d_taps.data(), context, [&](T* partial, Index first, Index last) {
    for (Index i = first; i < last; ++i) {
      const Index reach = std::min(count, Index(positions[static_cast<std::size_t>(i)]) + 1);
      for (Index h = 0; h < heads; ++h)
        for (Index t = 0; t < reach; ++t) {
          T* const to = partial + (h * count + t) * d;
          const T *const from = d_y.row(i) + h * d, *const other = x.row(i - t) + h * d;
          for (Index j = 0; j < d; ++j) to[j] += from[j] * other[j];
        }
    }
  });
}

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
