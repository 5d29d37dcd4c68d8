// The commitment loss: draws rows to the centroids of their clusters.
#pragma once

#include <cstdint>
#include <span>

#include "coterie/core/context.hpp"
#include "coterie/core/finite.hpp"
#include "coterie/core/ordered_sum.hpp"

namespace coterie {
namespace detail {

/// d_x without storage: the loss alone.
template <class T>
double commitment_loss(ConstView<T> x, std::span<const std::int32_t> labels, ConstView<T> centroids, double weight,
                       View<T> d_x, Context& context) {
  const char* const function = "commitment_loss";
  const Index n = x.rows(), d = x.cols(), k = centroids.rows();
  const bool differentiate = d_x.data() != nullptr;
  check_shape<T>(function, "x", x, n, d);
  check_shape<T>(function, "centroids", centroids, k, d);
  if (static_cast<Index>(labels.size()) != n) fail<ShapeError>(function, "labels", n, labels.size());
  if (differentiate) {
    check_shape<T>(function, "d_x", d_x, n, d);
    check_no_alias<T>(function, "d_x", d_x, "x", x);
    check_no_alias<T>(function, "d_x", d_x, "centroids", centroids);
  }
  for (const std::int32_t label : labels)
    if (label < -1 || label >= k) fail<ValueError>(function, "labels", join("-1 or in [0, ", k, ")"), label);
  if (!finite_row(&weight, 1)) fail<ValueError>(function, "weight", "a finite number", weight);
  if (!finite_rows(centroids)) fail<ValueError>(function, "centroids", "finite numbers", "NaN or infinity");
  if (n == 0) return 0;

  Arena::Scope scope(context.workspace().shared());
  std::int32_t* const label = context.workspace().shared().template take<std::int32_t>(n);
  double sums[2] = {0, 0};  // of squares, and of rows counted
  sum_over_rows<double>(n, 2, sums, context, [&](double* partial, Index first, Index last) {
    for (Index i = first; i < last; ++i) {
      const T* const row = x.row(i);
      label[i] = finite_row(row, d) ? labels[static_cast<std::size_t>(i)] : -1;
      if (label[i] < 0) continue;
      const T* const centroid = centroids.row(label[i]);
      // sum_j (x_ij - centroid_j)^2
      partial[0] += striped_sum<double>(d, [=](Index j) {
        const double difference = static_cast<double>(row[j]) - static_cast<double>(centroid[j]);
        return difference * difference;
      });
      partial[1] += 1;
    }
  });
  if (!(sums[1] > 0)) return 0;
  const double scale = weight / (sums[1] * static_cast<double>(d));
  if (differentiate)
    context.for_chunks(n, 512, [&](Index first, Index last, Index) {
      for (Index i = first; i < last; ++i) {
        if (label[i] < 0) continue;
        const T *const row = x.row(i), *const centroid = centroids.row(label[i]);
        T* const d_row = d_x.row(i);
        // d_x_i += 2 scale (x_i - centroid)
        for (Index j = 0; j < d; ++j)
          d_row[j] += static_cast<T>(2 * scale * (static_cast<double>(row[j]) - static_cast<double>(centroid[j])));
      }
    });
  return scale * sums[0];
}

}  // namespace detail

/// weight times the mean square distance of the labelled rows from their centroids; d_x gets its gradient.
///
/// Call it before OnlineKMeans::update: the rows were labelled by the centroids before it. Centroids are constants
/// here, without a gradient (the update moves them). It is a term of the training loss alone: a reported perplexity
/// goes without it.
/// Shapes: x, d_x tokens x dim, labels tokens, centroids clusters x dim.
/// Formula: loss = weight / (m dim) sum_i |x_i - centroid_label(i)|^2,
///   d_x_i += 2 weight / (m dim) (x_i - centroid_label(i)), with m the rows that count: those labelled -1 and those
///   with NaN or infinity are left out. Without any the loss is 0.
/// Requires: those shapes, d_x apart from the others (ShapeError); labels in [0, clusters) or -1, finite centroids and
///   weight (ValueError).
/// Adds into d_x; the overload without it gives the loss alone.
/// Allocates: nothing after warm-up.
/// Threads and determinism: summed in double, in an order that the number of rows alone sets.
/// Cost: 6 tokens dim operations.
/// Source: van den Oord et al. 2017 (VQ-VAE), as in the routing transformer's released code, with weight 1e-4.
inline double commitment_loss(ConstView<float> x, std::span<const std::int32_t> labels, ConstView<float> centroids,
                              double weight, View<float> d_x, Context& context) {
  return detail::commitment_loss<float>(x, labels, centroids, weight, d_x, context);
}
inline double commitment_loss(ConstView<double> x, std::span<const std::int32_t> labels, ConstView<double> centroids,
                              double weight, View<double> d_x, Context& context) {
  return detail::commitment_loss<double>(x, labels, centroids, weight, d_x, context);
}
inline double commitment_loss(ConstView<float> x, std::span<const std::int32_t> labels, ConstView<float> centroids,
                              double weight, Context& context) {
  return detail::commitment_loss<float>(x, labels, centroids, weight, {}, context);
}
inline double commitment_loss(ConstView<double> x, std::span<const std::int32_t> labels, ConstView<double> centroids,
                              double weight, Context& context) {
  return detail::commitment_loss<double>(x, labels, centroids, weight, {}, context);
}

}  // namespace coterie
