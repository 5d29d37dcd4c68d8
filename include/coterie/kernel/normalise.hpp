// Normalised rows over the head width: layer norm or unit length, forward and backward.
#pragma once

#include <cmath>

#include "coterie/core/context.hpp"
#include "coterie/core/ordered_sum.hpp"

namespace coterie {

/// How rows are normalised.
enum class Normalisation {
  layer_norm,   ///< zero mean and norm sqrt(width): layer norm without scale or bias (the paper)
  unit_length,  ///< norm 1, the mean stays: the cosine of vectors as they are
};

/// Added to the variance by layer norm.
inline constexpr double normalise_epsilon = 1e-6;

namespace detail {

/// Added to the square of the length: a row of zeros stays one.
inline constexpr double unit_length_epsilon = 1e-24;

/// The length of normalised rows.
inline double normalised_length(Normalisation normalisation, Index width) {
  return normalisation == Normalisation::layer_norm ? std::sqrt(static_cast<double>(width)) : 1.0;
}

/// Rows of a task of normalise_rows.
inline constexpr Index normalise_task_rows = 256;

// y = (x - mean x) / deviation x, or x / |x|; returns 1 / deviation or 1 / |x|. y may be x.
template <class T>
T normalise_row(const T* x, T* y, Index width, Normalisation normalisation) {
  if (normalisation == Normalisation::unit_length) {
    const T square = striped_sum<T>(width, [&](Index j) { return x[j] * x[j]; });
    const T inverse = T(1) / std::sqrt(square + static_cast<T>(unit_length_epsilon));
    for (Index j = 0; j < width; ++j) y[j] = x[j] * inverse;
    return inverse;
  }
  const T scale = T(1) / static_cast<T>(width);
  const T mean = striped_sum<T>(width, [&](Index j) { return x[j]; }) * scale;
  const T variance = striped_sum<T>(width, [&](Index j) { return (x[j] - mean) * (x[j] - mean); }) * scale;
  const T inverse = T(1) / std::sqrt(variance + static_cast<T>(normalise_epsilon));
  for (Index j = 0; j < width; ++j) y[j] = (x[j] - mean) * inverse;
  return inverse;
}

// d_x += (d_y - mean(d_y) - y * mean(d_y * y)) * inverse, or (d_y - y * (d_y . y)) * inverse: undoes normalise_row.
template <class T>
void normalise_row_backward(const T* y, T inverse, const T* d_y, T* d_x, Index width, Normalisation normalisation) {
  if (normalisation == Normalisation::unit_length) {
    const T along = striped_sum<T>(width, [&](Index j) { return d_y[j] * y[j]; });
    for (Index j = 0; j < width; ++j) d_x[j] += (d_y[j] - y[j] * along) * inverse;
    return;
  }
  const T scale = T(1) / static_cast<T>(width);
  const T mean = striped_sum<T>(width, [&](Index j) { return d_y[j]; }) * scale;
  const T along = striped_sum<T>(width, [&](Index j) { return d_y[j] * y[j]; }) * scale;
  for (Index j = 0; j < width; ++j) d_x[j] += (d_y[j] - mean - y[j] * along) * inverse;
}

template <class T>
Index check_segments(const char* function, ConstView<T> m, Index width) {
  if (width < 1 || m.cols() % width != 0)
    fail<ShapeError>(function, "width", join("a divisor of ", m.cols(), " columns"), width);
  return m.cols() / width;
}

}  // namespace detail

/// Normalises every `width` columns of every row.
///
/// Shapes: x, y tokens x (segments * width); inverse_deviation tokens x segments, or empty when no backward follows.
/// Formula, for each segment of each row, with r = inverse_deviation:
///   layer_norm:   y = (x - mean(x)) r,  r = 1 / sqrt(mean((x - mean(x))^2) + 1e-6); |y| is sqrt(width), or less where
///                 x hardly varies; a constant segment gives zeros.
///   unit_length:  y = x r,  r = 1 / sqrt(x.x + 1e-24); a segment of zeros gives zeros.
/// Requires: matching shapes, and y's own storage or exactly x's (ShapeError).
/// Overwrites y and inverse_deviation.
/// Threads and determinism: a segment's bits depend on that segment alone.
/// Source: Roy et al. 2021, section 4.1 (layer norm), the routing transformer for PyTorch (unit length); layer norm of
///   a width below 3 is degenerate and refused by its users.
template <class T>
void normalise_rows(detail::Same<ConstView<T>> x, View<T> y, detail::Same<View<T>> inverse_deviation, Index width,
                    Context& context, Normalisation normalisation = Normalisation::layer_norm) {
  const char* const function = "normalise_rows";
  const Index segments = detail::check_segments(function, x, width);
  const bool keep = inverse_deviation.data() != nullptr;
  detail::check_shape<T>(function, "x", x, x.rows(), x.cols());
  detail::check_shape<T>(function, "y", y, x.rows(), x.cols());
  const bool in_place = y.data() == x.data() && (y.stride() == x.stride() || x.rows() <= 1);
  if (!in_place) detail::check_no_alias(function, "y", y, "x", x);
  if (keep) {
    detail::check_shape<T>(function, "inverse_deviation", inverse_deviation, x.rows(), segments);
    detail::check_no_alias(function, "inverse_deviation", inverse_deviation, "x", x);
    detail::check_no_alias<T>(function, "inverse_deviation", inverse_deviation, "y", y);
  }
  context.for_chunks(x.rows(), detail::normalise_task_rows, [&](Index first, Index last, Index) {
    for (Index i = first; i < last; ++i)
      for (Index s = 0; s < segments; ++s) {
        const T inverse = detail::normalise_row(x.row(i) + s * width, y.row(i) + s * width, width, normalisation);
        if (keep) inverse_deviation(i, s) = inverse;
      }
  });
}

/// Gradient of normalise_rows: undoes y = (x - mean(x)) r, or y = x r.
///
/// Shapes: y, d_y, d_x tokens x (segments * width); inverse_deviation tokens x segments.
/// Formula:  d_x += r (d_y - mean(d_y) - y mean(d_y y)),  of unit length  d_x += r (d_y - y (d_y.y)),  y and r as
/// normalise_rows wrote them; x itself is not needed.
/// Requires: matching shapes, d_x's own storage (ShapeError).
/// Adds into d_x.
/// Threads and determinism: as normalise_rows.
template <class T>
void normalise_rows_backward(detail::Same<ConstView<T>> y, detail::Same<ConstView<T>> inverse_deviation,
                             detail::Same<ConstView<T>> d_y, View<T> d_x, Index width, Context& context,
                             Normalisation normalisation = Normalisation::layer_norm) {
  const char* const function = "normalise_rows_backward";
  const Index segments = detail::check_segments(function, y, width);
  detail::check_shape<T>(function, "y", y, y.rows(), y.cols());
  detail::check_shape<T>(function, "inverse_deviation", inverse_deviation, y.rows(), segments);
  detail::check_shape<T>(function, "d_y", d_y, y.rows(), y.cols());
  detail::check_shape<T>(function, "d_x", d_x, y.rows(), y.cols());
  detail::check_no_alias(function, "d_x", d_x, "y", y);
  detail::check_no_alias(function, "d_x", d_x, "inverse_deviation", inverse_deviation);
  detail::check_no_alias(function, "d_x", d_x, "d_y", d_y);
  context.for_chunks(y.rows(), detail::normalise_task_rows, [&](Index first, Index last, Index) {
    for (Index i = first; i < last; ++i)
      for (Index s = 0; s < segments; ++s)
        detail::normalise_row_backward(y.row(i) + s * width, inverse_deviation(i, s), d_y.row(i) + s * width,
                                       d_x.row(i) + s * width, width, normalisation);
  });
}

}  // namespace coterie
