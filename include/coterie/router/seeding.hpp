// Where centroids come from: seeded random directions, then k-means++ and Lloyd steps on a sample.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "coterie/core/ordered_sum.hpp"
#include "coterie/core/random.hpp"
#include "coterie/kernel/normalise.hpp"

namespace coterie::detail {

/// What the router draws random numbers for; each has a stream of its own.
enum class RouterStream : std::uint64_t { directions = 1, seeding, sample, revival, split };

inline std::uint64_t router_stream(RouterStream use, Index update = 0) {
  return static_cast<std::uint64_t>(use) + (static_cast<std::uint64_t>(update) << 8);
}

/// Fills every row with a random direction of the mean and length that normalised rows have.
template <class T>
void random_directions(View<T> centroids, std::uint64_t seed, Normalisation normalisation = Normalisation::layer_norm) {
  const Index d = centroids.cols();
  const std::uint64_t stream = router_stream(RouterStream::directions);
  std::vector<double> row(static_cast<std::size_t>(d));
  std::uint64_t counter = 0;
  for (Index c = 0; c < centroids.rows(); ++c) {
    double mean = 0, square = 0;
    for (double& value : row) mean += value = random_normal(seed, stream, counter++);
    mean = normalisation == Normalisation::layer_norm ? mean / static_cast<double>(d) : 0;
    for (double& value : row) value -= mean, square += value * value;
    const double scale = square > 0 ? normalised_length(normalisation, d) / std::sqrt(square) : 0;
    for (Index j = 0; j < d; ++j) centroids(c, j) = static_cast<T>(row[static_cast<std::size_t>(j)] * scale);
  }
}

template <class T>
[[gnu::always_inline]] inline T dot(const T* a, const T* b, Index d) {
  return striped_sum<T>(d, [=](Index j) { return a[j] * b[j]; });
}

template <class T>
[[gnu::always_inline]] inline T squared_distance(const T* a, const T* b, Index d) {
  return striped_sum<T>(d, [=](Index j) { return (a[j] - b[j]) * (a[j] - b[j]); });
}

/// Scratch of the functions below; grows once.
template <class T>
struct SeedingScratch {
  std::vector<T> nearest, candidate, best;  ///< squared distances, one per row of the sample
};

/// k-means++: every next centroid is a row drawn with probability proportional to its squared distance from those
/// chosen.
///
/// Shapes: rows m x d, centroids k x d. Of 2 + log k rows drawn, the one that leaves the smallest sum is taken (Arthur
/// and Vassilvitskii's greedy form): it hardly ever misses a cluster of its own. Above 128 centroids one row is drawn:
/// there a miss matters little, and the time much.
/// Returns how many centroids were chosen: fewer than k if there are fewer different rows; the others keep their value.
/// Overwrites the centroids chosen.
/// Allocates until the scratch has grown.
/// Cost: m k d (2 + log k), above 128 centroids m k d.
template <class T>
Index seed_centroids(ConstView<T> rows, View<T> centroids, std::uint64_t seed, SeedingScratch<T>& scratch) {
  const Index m = rows.rows(), k = centroids.rows(), d = rows.cols();
  if (m == 0) return 0;
  const std::uint64_t stream = router_stream(RouterStream::seeding);
  std::uint64_t counter = 0;
  const auto take = [&](Index c, Index i) { std::copy(rows.row(i), rows.row(i) + d, centroids.row(c)); };
  for (auto* v : {&scratch.nearest, &scratch.candidate, &scratch.best}) v->resize(static_cast<std::size_t>(m));

  const Index first = random_below(m, seed, stream, counter++);
  take(0, first);
  double sum = 0;
  for (Index i = 0; i < m; ++i) {
    const T distance = squared_distance(rows.row(i), rows.row(first), d);
    scratch.nearest[static_cast<std::size_t>(i)] = distance;
    sum += static_cast<double>(distance);
  }
  const Index draws = k <= 128 ? 2 + static_cast<Index>(std::log(static_cast<double>(k))) : 1;
  for (Index c = 1; c < k; ++c) {
    if (!(sum > 0)) return c;
    double best_sum = 0;
    Index best_row = -1;
    for (Index draw = 0; draw < draws; ++draw) {
      double left = random_uniform(seed, stream, counter++) * sum;
      Index row = -1;
      for (Index i = 0; i < m && (row < 0 || left >= 0); ++i) {
        const double weight = static_cast<double>(scratch.nearest[static_cast<std::size_t>(i)]);
        if (!(weight > 0)) continue;
        row = i;
        left -= weight;
        if (left < 0) break;
      }
      double candidate_sum = 0;
      for (Index i = 0; i < m; ++i) {
        const std::size_t at = static_cast<std::size_t>(i);
        const T distance = squared_distance(rows.row(i), rows.row(row), d);
        scratch.candidate[at] = distance < scratch.nearest[at] ? distance : scratch.nearest[at];
        candidate_sum += static_cast<double>(scratch.candidate[at]);
      }
      if (best_row < 0 || candidate_sum < best_sum) {
        best_row = row;
        best_sum = candidate_sum;
        scratch.best.swap(scratch.candidate);
      }
    }
    take(c, best_row);
    scratch.nearest.swap(scratch.best);
    sum = best_sum;
  }
  return k;
}

/// One Lloyd step: every row joins the centroid of the largest dot product (the lowest on ties), every centroid becomes
/// the mean of its rows; one without rows stays.
///
/// Shapes: rows m x d, centroids k x d, counts k, sums k*d. Overwrites all three; sums are those of the rows.
/// KeyClusters::settle (retrieval) steps by distance instead, for keys that are not normalised.
template <class T>
void lloyd_step(ConstView<T> rows, View<T> centroids, std::span<double> counts, std::span<double> sums) {
  const Index k = centroids.rows(), d = rows.cols();
  std::fill(counts.begin(), counts.end(), 0.0);
  std::fill(sums.begin(), sums.end(), 0.0);
  for (Index i = 0; i < rows.rows(); ++i) {
    Index nearest = 0;
    T best = dot(rows.row(i), centroids.row(0), d);
    for (Index c = 1; c < k; ++c) {
      const T score = dot(rows.row(i), centroids.row(c), d);
      if (score > best) best = score, nearest = c;
    }
    counts[static_cast<std::size_t>(nearest)] += 1;
    double* sum = sums.data() + nearest * d;
    for (Index j = 0; j < d; ++j) sum[j] += static_cast<double>(rows(i, j));
  }
  for (Index c = 0; c < k; ++c) {
    const double count = counts[static_cast<std::size_t>(c)];
    if (count > 0)
      for (Index j = 0; j < d; ++j) centroids(c, j) = static_cast<T>(sums[static_cast<std::size_t>(c * d + j)] / count);
  }
}

}  // namespace coterie::detail
