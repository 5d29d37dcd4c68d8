// The causal convolution of induction queries, forward and backward.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "coterie/core/context.hpp"
#include "coterie/core/ordered_sum.hpp"
#include "coterie/kernel/rows.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

/// to = sum over t of taps_t * rows[t], element by element, t ascending. Not inlined: forward and decoder have to round
/// alike.
template <class T>
[[gnu::noinline]] void convolve_row(const T* const* rows, Index count, ConstView<T> taps, T* to) {
  const Index d = taps.cols();
  std::fill(to, to + d, T(0));
  for (Index t = 0; t < count; ++t) {
    const T *const tap = taps.row(t), *const from = rows[t];
    for (Index j = 0; j < d; ++j) to[j] += tap[j] * from[j];
  }
}

/// A causal depth-wise convolution of every head within its sequence.
///
/// Shapes: x, y n x heads*d; taps heads*count x d, row h*count + t; positions n, of rows in their sequences.
/// Formula: y_ih = sum over t < count, t <= position_i of taps_ht * x_(i-t)h, element by element, t ascending.
/// Overwrites y.
template <class T>
void convolve(ConstView<T> x, ConstView<T> taps, Index count, std::span<const std::int32_t> positions, View<T> y,
              Context& context) {
  const Index d = taps.cols(), heads = x.cols() / d;
  context.for_chunks(x.rows(), chunk_rows, [&](Index first, Index last, Index worker) {
    Arena& arena = context.workspace().worker(worker);
    Arena::Scope scope(arena);
    const T** const rows = arena.take<const T*>(count);
    for (Index i = first; i < last; ++i) {
      const Index reach = (std::min)(count, Index(positions[static_cast<std::size_t>(i)]) + 1);
      for (Index h = 0; h < heads; ++h) {
        for (Index t = 0; t < reach; ++t) rows[t] = x.row(i - t) + h * d;
        convolve_row<T>(rows, reach, taps.rows(h * count, count), y.row(i) + h * d);
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
  context.for_chunks(n, chunk_rows, [&](Index first, Index last, Index) {
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
      const Index reach = (std::min)(count, Index(positions[static_cast<std::size_t>(i)]) + 1);
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
