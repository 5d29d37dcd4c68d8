// Centroids with their counts and sums, and how they follow the rows.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include "coterie/core/ordered_sum.hpp"
#include "coterie/router/config.hpp"
#include "coterie/router/seeding.hpp"

namespace coterie::detail {

/// The state of a router, and the ways to change it. Everything is kept in double; the centroids are rounded from it.
///
/// The sums are centroid times count with Average::counts_and_sums (but for a scaling of the centroid), the centroid
/// itself with the averages of batches.
template <class T>
class Centroids {
 public:
  /// Lloyd steps of start().
  static constexpr int lloyd_steps = 5;

  /// Random directions of the rows' length, with counts of zero. Allocates all there is.
  explicit Centroids(const KMeansConfig& config) : config_(config) {
    rows_.resize(config.clusters, config.dim);
    random_directions<T>(view(rows_), config.seed, config.normalisation);
    counts_.assign(static_cast<std::size_t>(config.clusters), 0.0);
    sums_.assign(static_cast<std::size_t>(config.clusters * config.dim), 0.0);
    for (Index c = 0; c < clusters(); ++c) settle(c, 0);
  }

  const KMeansConfig& config() const { return config_; }
  Index clusters() const { return config_.clusters; }
  Index dim() const { return config_.dim; }
  ConstView<T> rows() const { return rows_; }
  std::span<const double> counts() const { return counts_; }
  std::span<const double> sums() const { return sums_; }
  double count(Index c) const { return counts_[static_cast<std::size_t>(c)]; }
  double mean_count() const {
    double total = 0;
    for (const double count : counts_) total += count;
    return total / static_cast<double>(clusters());
  }
  double norm(const T* row) const {
    return std::sqrt(striped_sum<double>(dim(), [=](Index j) {
      const double value = static_cast<double>(row[j]);
      return value * value;
    }));
  }

  void restore(ConstView<T> rows, std::span<const double> counts, std::span<const double> sums) {
    for (Index c = 0; c < clusters(); ++c) std::copy(rows.row(c), rows.row(c) + dim(), view(rows_).row(c));
    std::copy(counts.begin(), counts.end(), counts_.begin());
    std::copy(sums.begin(), sums.end(), sums_.begin());
  }

  /// Centroids from the sample, counts and sums as if all `rows` observed were like it.
  void start(ConstView<T> samples, double rows) {
    SeedingScratch<T> scratch;
    seed_centroids(samples, view(rows_), config_.seed, scratch);
    for (int step = 0; step < lloyd_steps; ++step) lloyd_step<T>(samples, view(rows_), counts_, sums_);
    const double scale = rows / static_cast<double>(samples.rows());
    for (Index c = 0; c < clusters(); ++c) {
      double& count = counts_[static_cast<std::size_t>(c)];
      if (count > 0) {
        if (by_count())
          for (Index j = 0; j < dim(); ++j) sum_of(c)[j] *= scale;
        else
          for (Index j = 0; j < dim(); ++j) sum_of(c)[j] /= count;
        count *= scale;
        if (config_.router.renormalise) scale_to_norm(c);
      } else {
        settle(c, rows / static_cast<double>(clusters()));
      }
    }
  }

  /// One step of the moving averages; `keep` is what remains of the past.
  void average(std::span<const double> counts, std::span<const double> sums, double keep) {
    for (Index c = 0; c < clusters(); ++c) {
      const double rows = counts[static_cast<std::size_t>(c)];
      double& count = counts_[static_cast<std::size_t>(c)];
      const double* const batch = sums.data() + c * dim();
      double* const sum = sum_of(c);
      // N = l N + (1-l) n
      count = keep * count + (1 - keep) * rows;
      if (by_count()) {
        // S = l S + (1-l) s,  centroid = S / N
        for (Index j = 0; j < dim(); ++j) sum[j] = keep * sum[j] + (1 - keep) * batch[j];
        if (rows > 0)
          for (Index j = 0; j < dim(); ++j) rows_(c, j) = static_cast<T>(sum[j] / count);
      } else if (rows > 0) {
        // centroid = l centroid + (1-l) s / n, or s scaled to the length of rows
        const double scale = config_.router.average == Average::batch_mean ? 1 / rows : to_length(batch);
        for (Index j = 0; j < dim(); ++j) {
          sum[j] = keep * sum[j] + (1 - keep) * (batch[j] * scale);
          rows_(c, j) = static_cast<T>(sum[j]);
        }
      }
      if (rows > 0 && config_.router.renormalise) scale_to_norm(c);
    }
  }

  /// Puts a centroid where `row` points, no longer than `length` (renormalised: of the rows' length), with this count.
  void set_centroid(Index c, const T* row, double length, double count) {
    const double old = norm(row);
    double scale = old > length ? length / old : 1.0;
    if (config_.router.renormalise && old > 0) scale = length_of_rows() / old;
    for (Index j = 0; j < dim(); ++j) rows_(c, j) = static_cast<T>(static_cast<double>(row[j]) * scale);
    settle(c, count);
  }

  /// Gives a cluster the count and the sums that keep it where it is.
  void settle(Index c, double count) {
    counts_[static_cast<std::size_t>(c)] = count;
    for (Index j = 0; j < dim(); ++j) sum_of(c)[j] = (by_count() ? count : 1.0) * static_cast<double>(rows_(c, j));
  }

  /// Halves the past of a cluster, which stays where it is.
  void halve(Index c) {
    counts_[static_cast<std::size_t>(c)] /= 2;
    if (by_count())
      for (Index j = 0; j < dim(); ++j) sum_of(c)[j] /= 2;
  }

 private:
  bool by_count() const { return config_.router.average == Average::counts_and_sums; }
  double* sum_of(Index c) { return sums_.data() + c * dim(); }

  double length_of_rows() const { return normalised_length(config_.normalisation, dim()); }
  // The factor that gives a sum the length of rows; 0 for one of length zero.
  double to_length(const double* sum) const {
    const double square = striped_sum<double>(dim(), [=](Index j) { return sum[j] * sum[j]; });
    return square > 0 ? length_of_rows() / std::sqrt(square) : 0;
  }
  // The centroid gets the direction of its sum and the length of rows; one of length zero stays zero.
  void scale_to_norm(Index c) {
    double* const sum = sum_of(c);
    const double scale = to_length(sum);
    if (scale == 0) return;
    for (Index j = 0; j < dim(); ++j) {
      const double value = sum[j] * scale;
      if (!by_count()) sum[j] = value;
      rows_(c, j) = static_cast<T>(value);
    }
  }

  KMeansConfig config_;
  RowMatrix<T> rows_;
  std::vector<double> counts_, sums_;
};

}  // namespace coterie::detail
