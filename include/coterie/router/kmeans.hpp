// Online k-means: says which tokens are alike. One OnlineKMeans per routed head; knows no attention and no plan.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <type_traits>
#include <vector>

#include "coterie/core/context.hpp"
#include "coterie/core/random.hpp"
#include "coterie/kernel/product.hpp"
#include "coterie/router/seeding.hpp"

namespace coterie {

namespace detail {

// Whether all numbers of a row are finite: by their bits, for -ffast-math may assume that they are.
template <class T>
bool finite_row(const T* x, Index d) {
  using Bits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  constexpr int digits = sizeof(T) == 4 ? 23 : 52;  // of the fraction
  constexpr Bits exponent = std::numeric_limits<Bits>::max() >> 1 >> digits << digits;
  // One more carries into the sign bit where the exponent is all ones, and nowhere else.
  Bits carried = 0;
  for (Index j = 0; j < d; ++j) carried |= (std::bit_cast<Bits>(x[j]) & exponent) + (Bits(1) << digits);
  return carried >> (8 * sizeof(T) - 1) == 0;
}

// sum += x. Out of line: inside the loop over rows g++ makes a slow scalar loop of it.
template <class T>
[[gnu::noinline]] void add_row(const T* x, Index count, double* sum) {
  for (Index j = 0; j < count; ++j) sum[j] += static_cast<double>(x[j]);
}

}  // namespace detail

/// How evenly rows fall on the clusters of a head.
struct RouterLoad {
  double rows = 0;        ///< rows counted
  double perplexity = 0;  ///< exp of the entropy of the load: clusters if even, 1 if one has all, 0 without rows
  double largest = 0;     ///< share of the fullest cluster
  Index empty = 0;        ///< clusters without rows
};

/// The load of the clusters whose counts are given: of a batch (RouterStatistics::counts) or of the past (OnlineKMeans::counts).
inline RouterLoad router_load(std::span<const double> counts) {
  RouterLoad load;
  for (const double count : counts) load.rows += count;
  double entropy = 0;
  for (const double count : counts) {
    if (!(count > 0)) {
      ++load.empty;
      continue;
    }
    const double share = count / load.rows;
    load.largest = std::max(load.largest, share);
    entropy -= share * std::log(share);
  }
  if (load.rows > 0) load.perplexity = std::exp(entropy);
  return load;
}

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
    faults.require(heads >= 0, "heads", "at least 0", heads);
    faults.require(clusters >= 1, "clusters", "at least 1", clusters);
    faults.require(dim >= 1, "dim", "at least 1", dim);
    faults.require(sample >= 0, "sample", "at least 0", sample);
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

/// Settings of OnlineKMeans.
struct KMeansConfig {
  Index clusters = 0;      ///< at least 1
  Index dim = 0;           ///< width of the rows; at least 3, for layer norm leaves nothing of narrower ones
  double decay = 0.999;    ///< in [0, 1): how much of the past an update keeps, in the long run
  std::uint64_t seed = 0;  ///< of the first directions, the seeding, the sample and the revivals
};

/// Spherical k-means of one head, learned from batch to batch by moving averages.
///
/// Rows come in normalised (normalise_rows: zero mean, norm sqrt(dim)), so that the largest dot product with a centroid is
/// the cosine times the centroid's norm. Centroids are means, not normalised again: one of a tight cluster is longer.
///
///     router.assign(rows, labels, context);                      // const
///     router.observe(rows, labels, statistics, head, context);   // const; adds into statistics
///     router.update(statistics, head);                           // the only call that moves centroids
///     statistics.clear();
///
/// Centroids are state, not parameters: no optimiser or weight decay touches them. The whole state is centroids(), counts(),
/// sums() and updates(); restore() takes them back.
/// Threads and determinism: everything drawn is a function of the seed, the number of updates and the row's number; no result
/// depends on the number of workers. const calls may run at the same time; routers of different heads share nothing.
/// Source: Roy et al. 2021, section 4.1, in the form of counts and sums of van den Oord et al. 2017 (VQ-VAE); start,
/// schedule and revival are ours.
template <class T>
class OnlineKMeans {
 public:
  /// Lloyd steps of the first update.
  static constexpr int lloyd_steps = 5;
  /// A cluster is dead when a batch gave it no row and its average count has fallen below this share of the mean count.
  static constexpr double dead_share = 0.1;

  /// Centroids are random directions of norm sqrt(dim), drawn from the seed.
  /// Requires: the ranges that KMeansConfig names (ValueError, one for all faults).
  explicit OnlineKMeans(const KMeansConfig& config) : config_(config) {
    detail::Faults faults("OnlineKMeans");
    faults.require(config.clusters >= 1, "clusters", "at least 1", config.clusters);
    faults.require(config.dim >= 3, "dim", "at least 3", config.dim);
    faults.require(config.decay >= 0 && config.decay < 1, "decay", "in [0, 1)", config.decay);
    faults.raise();
    centroids_.resize(config.clusters, config.dim);
    detail::random_directions<T>(view(centroids_), config.seed);
    counts_.assign(static_cast<std::size_t>(config.clusters), 0.0);
    sums_.assign(static_cast<std::size_t>(config.clusters * config.dim), 0.0);
  }

  const KMeansConfig& config() const { return config_; }
  Index clusters() const { return config_.clusters; }
  Index dim() const { return config_.dim; }

  /// The centroids, clusters x dim.
  ConstView<T> centroids() const { return centroids_; }
  /// Moving average of the rows per cluster and update.
  std::span<const double> counts() const { return counts_; }
  /// Moving average of the sums of rows, clusters x dim.
  std::span<const double> sums() const { return sums_; }
  /// Updates done; those that were frozen or had no rows do not count.
  Index updates() const { return updates_; }
  /// While frozen, update() does nothing.
  void freeze(bool frozen) { frozen_ = frozen; }
  bool frozen() const { return frozen_; }

  /// What the next update keeps of the past: min(decay, (1+t)/(10+t)) after t updates.
  double next_decay() const {
    const double t = static_cast<double>(updates_);
    return std::min(config_.decay, (1 + t) / (10 + t));
  }

  /// labels[i] = argmax over c of x_i . centroid_c, the lowest c on ties.
  ///
  /// Shapes: x tokens x dim, labels tokens. Requires: those (ShapeError).
  /// Overwrites labels. A row with NaN gets some label of the range.
  /// Threads and determinism: a label depends on its row, the centroids and the instruction set alone.
  /// Cost: 2 tokens clusters dim operations.
  void assign(ConstView<T> x, std::span<std::int32_t> labels, Context& context) const {
    check_rows("OnlineKMeans::assign", x, static_cast<Index>(labels.size()));
    if (x.rows() > 0) nearest_centroids<T>(x, centroids(), labels, context);
  }

  /// Adds rows, each to the count and sum of its label, and offers them to the sample.
  ///
  /// Shapes: x tokens x dim, labels tokens, statistics of this router's clusters and dim.
  /// Requires: those (ShapeError), labels in [0, clusters) or -1, a head of the statistics (ValueError).
  /// Adds into statistics. Rows labelled -1 and rows with NaN or infinity are left out: one bad batch spoils no centroid.
  /// Threads and determinism: every sum runs in row order, so micro-batches one after the other give the bits of one batch.
  void observe(ConstView<T> x, std::span<const std::int32_t> labels, RouterStatistics<T>& statistics, Index head,
               Context& context) const {
    check_observe(x, labels, statistics, head);
    const Index n = x.rows(), d = dim();
    if (n == 0) return;
    Arena::Scope scope(context.workspace().shared());
    std::int32_t* const label = context.workspace().shared().template take<std::int32_t>(n);
    context.for_chunks(n, 512, [&](Index first, Index last, Index) {
      for (Index i = first; i < last; ++i)
        label[i] = detail::finite_row(x.row(i), d) ? labels[static_cast<std::size_t>(i)] : -1;
    });
    // A task owns a few columns (a cache line) of all sums; the last one owns the counts and the sample.
    constexpr Index columns = 64 / sizeof(T);
    const Index slices = (d + columns - 1) / columns;
    double* const sums = statistics.sums_of(head);
    double* const counts = statistics.counts_of(head);
    context.for_each(slices + 1, [&](Index task, Index) {
      if (task == slices) {
        for (Index i = 0; i < n; ++i)
          if (label[i] >= 0) {
            counts[label[i]] += 1;
            statistics.offer(head, x.row(i), config_.seed, updates_);
          }
        return;
      }
      const Index begin = task * columns, end = std::min(d, begin + columns);
      for (Index i = 0; i < n; ++i)
        if (label[i] >= 0) {
          double* const sum = sums + label[i] * d;
          for (Index j = begin; j < end; ++j) sum[j] += static_cast<double>(x(i, j));
        }
    });
  }

  /// The same in the calling thread, for use inside a task: heads can observe side by side.
  void observe(ConstView<T> x, std::span<const std::int32_t> labels, RouterStatistics<T>& statistics,
               Index head) const {
    check_observe(x, labels, statistics, head);
    double* const sums = statistics.sums_of(head);
    double* const counts = statistics.counts_of(head);
    const Index d = dim();
    for (Index i = 0; i < x.rows(); ++i) {
      const std::int32_t label = labels[static_cast<std::size_t>(i)];
      const T* const row = x.row(i);
      if (label < 0 || !detail::finite_row(row, d)) continue;
      counts[label] += 1;
      detail::add_row(row, d, sums + label * d);
      statistics.offer(head, row, config_.seed, updates_);
    }
  }

  /// Moves the centroids by what was observed; the only call that does.
  ///
  /// Formula: the first update takes the centroids from the sample (k-means++, then Lloyd steps), with counts and sums scaled
  /// to the rows observed; where the sample has fewer different rows than clusters, the others keep their random direction.
  /// Later ones, with n_c rows of sum s_c in cluster c and l = next_decay():
  ///     N_c = l N_c + (1-l) n_c,   S_c = l S_c + (1-l) s_c,   and where n_c > 0   centroid_c = S_c / N_c.
  /// A dead cluster (see dead_share) becomes a random row of the sample, cut to the mean length of the live centroids (at full
  /// length it would win rows far from it), with N_c the mean count and S_c = N_c centroid_c: it lives on where it is.
  /// Requires: statistics of this router's clusters and dim (ShapeError); a head of theirs, all numbers finite, counts not
  /// negative (ValueError). Without observed rows, or frozen, nothing changes.
  /// Allocates in the first update only. Cost: clusters * dim; the first one sample * clusters * dim * (7 + log clusters).
  void update(const RouterStatistics<T>& statistics, Index head) {
    check_update(statistics, head);
    update_checked(statistics, head);
  }

  /// update() of statistics that check_update() has let pass, for those who check several heads before they move any.
  void update_checked(const RouterStatistics<T>& statistics, Index head) {
    if (frozen_) return;
    const std::span<const double> counts = statistics.counts(head);
    double rows = 0;
    for (const double count : counts) rows += count;
    if (!(rows > 0)) return;
    const ConstView<T> samples = statistics.samples(head);
    if (updates_ == 0 && samples.rows() > 0)
      start(samples, rows);
    else
      average(counts, statistics.sums(head), samples);
    ++updates_;
  }

  /// Throws what update() would throw for these statistics, and does nothing else.
  void check_update(const RouterStatistics<T>& statistics, Index head) const {
    const char* const function = "OnlineKMeans::update";
    check_statistics(function, statistics, head);
    check_numbers(function, statistics.counts(head), statistics.sums(head));
    const Index filled = statistics.samples(head).rows();
    if (filled < 0 || filled > statistics.sample_limit())
      detail::fail<ValueError>(function, "sample_counts", detail::join("in [0, ", statistics.sample_limit(), "]"),
                               filled);
    bool finite = true;
    for (Index i = 0; i < filled; ++i) finite &= detail::finite_row(statistics.samples(head).row(i), dim());
    if (!finite) detail::fail<ValueError>(function, "samples", "finite rows", "NaN or infinity");
  }

  /// Takes back a state that centroids(), counts(), sums() and updates() gave.
  /// Requires: their shapes (ShapeError); finite numbers, no negative count or number of updates (ValueError).
  void restore(ConstView<T> centroids, std::span<const double> counts, std::span<const double> sums, Index updates) {
    const char* const function = "OnlineKMeans::restore";
    detail::check_shape<T>(function, "centroids", centroids, clusters(), dim());
    if (counts.size() != counts_.size()) detail::fail<ShapeError>(function, "counts", counts_.size(), counts.size());
    if (sums.size() != sums_.size()) detail::fail<ShapeError>(function, "sums", sums_.size(), sums.size());
    bool finite = true;
    for (Index c = 0; c < clusters(); ++c) finite &= detail::finite_row(centroids.row(c), dim());
    if (!finite) detail::fail<ValueError>(function, "centroids", "finite numbers", "NaN or infinity");
    check_numbers(function, counts, sums);
    if (updates < 0) detail::fail<ValueError>(function, "updates", "at least 0", updates);
    for (Index c = 0; c < clusters(); ++c)
      std::copy(centroids.row(c), centroids.row(c) + dim(), view(centroids_).row(c));
    std::copy(counts.begin(), counts.end(), counts_.begin());
    std::copy(sums.begin(), sums.end(), sums_.begin());
    updates_ = updates;
  }

 private:
  void check_rows(const char* function, ConstView<T> x, Index labels) const {
    detail::check_shape<T>(function, "x", x, x.rows(), dim());
    if (labels != x.rows()) detail::fail<ShapeError>(function, "labels", x.rows(), labels);
  }

  void check_statistics(const char* function, const RouterStatistics<T>& statistics, Index head) const {
    if (statistics.clusters() != clusters() || statistics.dim() != dim())
      detail::fail<ShapeError>(function, "statistics", detail::join(clusters(), " x ", dim()),
                               detail::join(statistics.clusters(), " x ", statistics.dim()));
    if (head < 0 || head >= statistics.heads())
      detail::fail<ValueError>(function, "head", detail::join("in [0, ", statistics.heads(), ")"), head);
  }

  void check_observe(ConstView<T> x, std::span<const std::int32_t> labels, const RouterStatistics<T>& statistics,
                     Index head) const {
    const char* const function = "OnlineKMeans::observe";
    check_rows(function, x, static_cast<Index>(labels.size()));
    check_statistics(function, statistics, head);
    for (const std::int32_t label : labels)
      if (label < -1 || label >= clusters())
        detail::fail<ValueError>(function, "labels", detail::join("-1 or in [0, ", clusters(), ")"), label);
  }

  void check_numbers(const char* function, std::span<const double> counts, std::span<const double> sums) const {
    if (!detail::finite_row(counts.data(), static_cast<Index>(counts.size())))
      detail::fail<ValueError>(function, "counts", "finite numbers", "NaN or infinity");
    for (const double count : counts)
      if (count < 0) detail::fail<ValueError>(function, "counts", "at least 0", count);
    if (!detail::finite_row(sums.data(), static_cast<Index>(sums.size())))
      detail::fail<ValueError>(function, "sums", "finite numbers", "NaN or infinity");
  }

  double* sum_of(Index c) { return sums_.data() + c * dim(); }

  // The first update: centroids from the sample, counts and sums as if all `rows` observed were like it.
  void start(ConstView<T> samples, double rows) {
    const View<T> centroids = view(centroids_);
    detail::SeedingScratch<T> scratch;
    detail::seed_centroids(samples, centroids, config_.seed, scratch);
    for (int step = 0; step < lloyd_steps; ++step) detail::lloyd_step<T>(samples, centroids, counts_, sums_);
    const double scale = rows / static_cast<double>(samples.rows());
    for (Index c = 0; c < clusters(); ++c) {
      double& count = counts_[static_cast<std::size_t>(c)];
      if (count > 0) {
        count *= scale;
        for (Index j = 0; j < dim(); ++j) sum_of(c)[j] *= scale;
      } else {
        settle(c, rows / static_cast<double>(clusters()));
      }
    }
  }

  void average(std::span<const double> counts, std::span<const double> sums, ConstView<T> samples) {
    const double keep = next_decay();
    double total = 0;
    for (Index c = 0; c < clusters(); ++c) {
      const double rows = counts[static_cast<std::size_t>(c)];
      double& count = counts_[static_cast<std::size_t>(c)];
      // N = l N + (1-l) n,  S = l S + (1-l) s,  centroid = S / N
      count = keep * count + (1 - keep) * rows;
      total += count;
      for (Index j = 0; j < dim(); ++j) {
        double& sum = sum_of(c)[j];
        sum = keep * sum + (1 - keep) * sums[static_cast<std::size_t>(c * dim() + j)];
        if (rows > 0) centroids_(c, j) = static_cast<T>(sum / count);
      }
    }
    if (samples.rows() > 0) revive(counts, samples, total / static_cast<double>(clusters()));
  }

  void revive(std::span<const double> counts, ConstView<T> samples, double mean) {
    const auto dead = [&](Index c) {
      const std::size_t at = static_cast<std::size_t>(c);
      return !(counts[at] > 0) && counts_[at] < dead_share * mean;
    };
    double length = 0;
    Index live = 0;
    for (Index c = 0; c < clusters(); ++c)
      if (!dead(c)) length += norm(centroids_.row(c).data()), ++live;
    if (live == clusters()) return;
    COTERIE_ASSERT(live > 0);
    length /= static_cast<double>(live);
    const std::uint64_t stream = detail::router_stream(detail::RouterStream::revival, updates_);
    for (Index c = 0; c < clusters(); ++c) {
      if (!dead(c)) continue;
      const Index row = detail::random_below(samples.rows(), config_.seed, stream, static_cast<std::uint64_t>(c));
      const double old = norm(samples.row(row));
      const double scale = old > length ? length / old : 1.0;
      for (Index j = 0; j < dim(); ++j) centroids_(c, j) = static_cast<T>(static_cast<double>(samples(row, j)) * scale);
      settle(c, mean);
    }
  }

  // Gives a cluster the statistics that keep it where it is.
  void settle(Index c, double count) {
    counts_[static_cast<std::size_t>(c)] = count;
    for (Index j = 0; j < dim(); ++j) sum_of(c)[j] = count * static_cast<double>(centroids_(c, j));
  }

  double norm(const T* row) const { return std::sqrt(static_cast<double>(detail::dot(row, row, dim()))); }

  KMeansConfig config_;
  RowMatrix<T> centroids_;
  std::vector<double> counts_, sums_;
  Index updates_ = 0;
  bool frozen_ = false;
};

}  // namespace coterie
