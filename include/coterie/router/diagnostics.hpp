// Diagnostics of routers: how evenly rows fall on clusters, how far centroids moved.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>

#include "coterie/core/matrix.hpp"
#include "coterie/core/ordered_sum.hpp"

namespace coterie {

/// How evenly rows fall on the clusters of a head.
struct RouterLoad {
  double rows = 0;        ///< rows counted
  double entropy = 0;     ///< of the load, in nats: log(clusters) if even, 0 if one has all or without rows
  double perplexity = 0;  ///< exp(entropy): clusters if even, 1 if one has all; 0 without rows
  double largest = 0;     ///< share of the fullest cluster
  Index empty = 0;        ///< clusters without rows
};

/// The load of the clusters whose counts are given: of a batch (RouterStatistics::counts) or of the past
/// (OnlineKMeans::counts).
inline RouterLoad router_load(std::span<const double> counts) {
  RouterLoad load;
  for (const double count : counts) load.rows += count;
  for (const double count : counts) {
    if (!(count > 0)) {
      ++load.empty;
      continue;
    }
    const double share = count / load.rows;
    load.largest = (std::max)(load.largest, share);
    load.entropy -= share * std::log(share);
  }
  if (load.rows > 0) load.perplexity = std::exp(load.entropy);
  return load;
}

/// How far the centroids of a head moved. Distances are in units of sqrt(dim), the norm of a normalised row; angles in
/// radians.
struct RouterDrift {
  double mean_distance = 0, largest_distance = 0;
  double mean_angle = 0,
         largest_angle = 0;  ///< a centroid of length zero is at a right angle to every other, at 0 to another
  Index moved = 0;           ///< clusters whose centroid moved further than `distance`
};

namespace detail {

template <class T>
RouterDrift router_drift(ConstView<T> before, ConstView<T> after, double distance) {
  check_shape<T>("router_drift", "after", after, before.rows(), before.cols());
  const Index k = before.rows(), d = before.cols();
  RouterDrift drift;
  const auto squared = [d](auto term) {
    return striped_sum<double>(d, [&](Index j) {
      const double value = term(j);
      return value * value;
    });
  };
  for (Index c = 0; c < k; ++c) {
    const T *const a = before.row(c), *const b = after.row(c);
    const auto difference = [&](double scale_a, double scale_b) {
      return squared(
          [=](Index j) { return static_cast<double>(b[j]) * scale_b - static_cast<double>(a[j]) * scale_a; });
    };
    const double moved = std::sqrt(difference(1, 1) / static_cast<double>(d));
    const double length_a = std::sqrt(squared([=](Index j) { return static_cast<double>(a[j]); }));
    const double length_b = std::sqrt(squared([=](Index j) { return static_cast<double>(b[j]); }));
    // The chord of unit vectors at the angle t is 2 sin(t / 2): exact for small angles, where the cosine is not.
    double angle = length_a > 0 || length_b > 0 ? std::asin(1.0) : 0.0;
    if (length_a > 0 && length_b > 0)
      angle = 2 * std::asin((std::min)(1.0, std::sqrt(difference(1 / length_a, 1 / length_b)) / 2));
    drift.mean_distance += moved / static_cast<double>(k);
    drift.mean_angle += angle / static_cast<double>(k);
    drift.largest_distance = (std::max)(drift.largest_distance, moved);
    drift.largest_angle = (std::max)(drift.largest_angle, angle);
    if (moved > distance) ++drift.moved;
  }
  return drift;
}

}  // namespace detail

/// How far the centroids went from `before` to `after`, for instance from a copy taken before an update to the router's
/// own.
///
///     const RowMatrix<float> before = router.centroids().eigen();
///     router.update(statistics, head);
///     const RouterDrift drift = router_drift(before, router.centroids(), 0.5);  // moved: revived or split
///
/// Shapes: both clusters x dim. Requires: those (ShapeError).
/// `distance`: how far a centroid must have gone, in units of sqrt(dim), to count as moved; 0: at all.
/// Cost: 8 clusters dim operations, in double.
inline RouterDrift router_drift(ConstView<float> before, ConstView<float> after, double distance = 0) {
  return detail::router_drift<float>(before, after, distance);
}
inline RouterDrift router_drift(ConstView<double> before, ConstView<double> after, double distance = 0) {
  return detail::router_drift<double>(before, after, distance);
}

}  // namespace coterie
