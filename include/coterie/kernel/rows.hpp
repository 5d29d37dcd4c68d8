// Row arithmetic: fill, copy, add, bias.
#pragma once

#include <algorithm>

#include "coterie/core/context.hpp"
#include "coterie/core/ordered_sum.hpp"
#include "coterie/kernel/lanes.hpp"

namespace coterie::detail {
inline namespace COTERIE_FLAGS_NAMESPACE {

/// Rows of a task that works row by row.
inline constexpr Index chunk_rows = 128;

/// m = value, row by row.
template <class T>
void fill_rows(View<T> m, T value, Context& context) {
  context.for_chunks(m.rows(), chunk_rows, [&](Index first, Index last, Index) {
    for (Index i = first; i < last; ++i) std::fill(m.row(i), m.row(i) + m.cols(), value);
  });
}

/// m = other.
template <class T>
void copy_rows(View<T> m, ConstView<T> other, Context& context) {
  context.for_chunks(m.rows(), chunk_rows, [&](Index first, Index last, Index) {
    for (Index i = first; i < last; ++i) std::copy(other.row(i), other.row(i) + m.cols(), m.row(i));
  });
}

/// m += other.
template <class T>
void add_rows(View<T> m, ConstView<T> other, Context& context) {
  context.for_chunks(m.rows(), chunk_rows, [&](Index first, Index last, Index) {
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
  context.for_chunks(m.rows(), chunk_rows, [&](Index first, Index last, Index) {
    for (Index i = first; i < last; ++i) {
      T* const to = m.row(i);
      for (Index j = 0; j < m.cols(); ++j) to[j] += bias[j];
    }
  });
}

/// d_bias += sum_i d_m_i: undoes add_bias for the bias.
template <class T>
void add_bias_backward(ConstView<T> d_m, T* d_bias, Context& context) {
  sum_over_rows(d_m.rows(), d_m.cols(), d_bias, context, [&](T* partial, Index first, Index last) {
    for (Index i = first; i < last; ++i)
      for (Index j = 0; j < d_m.cols(); ++j) partial[j] += d_m(i, j);
  });
}

}  // namespace COTERIE_FLAGS_NAMESPACE
}  // namespace coterie::detail
