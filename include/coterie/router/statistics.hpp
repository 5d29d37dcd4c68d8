// What batches tell routers: rows per cluster, their sums, a sample of the rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "coterie/core/check.hpp"
#include "coterie/core/matrix.hpp"
#include "coterie/core/random.hpp"
#include "coterie/router/diagnostics.hpp"
#include "coterie/router/seeding.hpp"

namespace coterie {

template <class T>
class OnlineKMeans;

/// What the batches since clear() tell the routers of a layer: rows per cluster, their sums, and a sample of the rows.
///
/// Micro-batches observe into the same object. Several machines add their `block()` (sums), and take `sample_block()` and
/// `sample_counts()` of the first machine (a broadcast; never a sum); then every machine updates to the same centroids.
/// Allocates in the constructor only.
template <class T>
class RouterStatistics {
 public:
  RouterStatistics() = default;

  /// For `heads` routers of `clusters` x `dim`, with a sample of at most `sample` rows a head; 0: max(2048, 8 clusters).
  /// Requires: no negative number, clusters and dim at least 1 (ValueError).
  RouterStatistics(Index heads, Index clusters, Index dim, Index sample = 0)
      : heads_(heads), clusters_(clusters), dim_(dim), sample_(sample) {
    detail::Faults faults("RouterStatistics");
    faults.expect(heads >= 0, "heads", "at least 0", heads);
    faults.expect(clusters >= 1, "clusters", "at least 1", clusters);
    faults.expect(dim >= 1, "dim", "at least 1", dim);
    faults.expect(sample >= 0, "sample", "at least 0", sample);
    faults.raise();
    if (sample_ == 0) sample_ = std::max(Index(2048), 8 * clusters);
    block_.assign(static_cast<std::size_t>(heads * head_block()), 0.0);
    samples_ = RowMatrix<T>::Zero(heads * sample_, dim);
    sample_counts_.assign(static_cast<std::size_t>(heads), 0);
    rows_.assign(static_cast<std::size_t>(heads), 0);
  }

  Index heads() const { return heads_; }
  Index clusters() const { return clusters_; }
  Index dim() const { return dim_; }
  Index sample_limit() const { return sample_; }

  /// All counts and sums: head by head, `clusters` counts, then `clusters` x `dim` sums. To be summed over machines.
  std::span<double> block() { return block_; }
  std::span<const double> block() const { return block_; }

  /// Rows per cluster of a head.
  std::span<const double> counts(Index head) const {
    return head_span(head).first(static_cast<std::size_t>(clusters_));
  }
  /// Sums of the rows of each cluster of a head, clusters x dim.
  std::span<const double> sums(Index head) const {
    return head_span(head).subspan(static_cast<std::size_t>(clusters_));
  }

  /// The rows drawn for a head: all it has seen while they are few, then each with equal probability.
  ConstView<T> samples(Index head) const {
    return {samples_.data() + head * sample_ * dim_, static_cast<Index>(sample_counts_[static_cast<std::size_t>(head)]),
            dim_, dim_};
  }
  /// Storage of all samples, heads x sample_limit() x dim, and how many rows of it each head has filled: to be broadcast.
  std::span<T> sample_block() { return {samples_.data(), static_cast<std::size_t>(samples_.size())}; }
  std::span<std::int64_t> sample_counts() { return sample_counts_; }

  /// How evenly the rows of a head fall on its clusters.
  RouterLoad load(Index head) const { return router_load(counts(head)); }

  /// Forgets all rows; keeps the memory.
  void clear() {
    std::fill(block_.begin(), block_.end(), 0.0);
    std::fill(sample_counts_.begin(), sample_counts_.end(), 0);
    std::fill(rows_.begin(), rows_.end(), 0);
  }

 private:
  friend class OnlineKMeans<T>;

  Index head_block() const { return clusters_ * (1 + dim_); }
  std::span<const double> head_span(Index head) const {
    return std::span<const double>(block_).subspan(static_cast<std::size_t>(head * head_block()),
                                                   static_cast<std::size_t>(head_block()));
  }
  double* counts_of(Index head) { return block_.data() + head * head_block(); }
  double* sums_of(Index head) { return counts_of(head) + clusters_; }

  // Reservoir sampling (Vitter's algorithm R): row number r stays with probability sample / (r + 1).
  void offer(Index head, const T* row, std::uint64_t seed, Index update) {
    const std::size_t h = static_cast<std::size_t>(head);
    const std::int64_t number = rows_[h]++;
    Index slot = static_cast<Index>(number);
    if (slot >= sample_)
      slot = detail::random_below(slot + 1, seed, detail::router_stream(detail::RouterStream::sample, update),
                                  static_cast<std::uint64_t>(number));
    if (slot >= sample_) return;
    std::copy(row, row + dim_, samples_.data() + (head * sample_ + slot) * dim_);
    sample_counts_[h] = std::min<std::int64_t>(number + 1, sample_);
  }

  Index heads_ = 0, clusters_ = 0, dim_ = 0, sample_ = 0;
  std::vector<double> block_;
  RowMatrix<T> samples_;
  std::vector<std::int64_t> sample_counts_, rows_;
};

}  // namespace coterie
