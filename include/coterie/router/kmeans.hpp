// Online k-means: says which tokens are alike. One OnlineKMeans per routed head; knows no attention and no plan.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <span>

#include "coterie/core/context.hpp"
#include "coterie/core/finite.hpp"
#include "coterie/kernel/nearest.hpp"
#include "coterie/kernel/product.hpp"
#include "coterie/router/centroids.hpp"
#include "coterie/router/config.hpp"
#include "coterie/router/relocation.hpp"
#include "coterie/router/statistics.hpp"

namespace coterie {

namespace detail {

// sum += x. Out of line: inside the loop over rows g++ makes a slow scalar loop of it.
template <class T>
[[gnu::noinline]] void add_row(const T* x, Index count, double* sum) {
  for (Index j = 0; j < count; ++j) sum[j] += static_cast<double>(x[j]);
}

/// Numbers for revisions of centroids, each given once in a program.
inline std::uint64_t next_revision() {
  static std::atomic<std::uint64_t> last{0};
  return ++last;
}

}  // namespace detail

/// Spherical k-means of one head, learned from batch to batch by moving averages.
///
/// Rows come in normalised (normalise_rows: zero mean and norm sqrt(dim), or norm 1), so that the largest dot product
/// with a centroid is the cosine times the centroid's norm. Centroids are means, not normalised again unless
/// RouterConfig::renormalise says so: one of a tight cluster is longer.
///
///     router.assign(rows, labels, context);                      // const
///     router.observe(rows, labels, statistics, head, context);   // const; adds into statistics
///     router.update(statistics, head);                           // the only call that moves centroids
///     statistics.clear();
///
/// Centroids are state, not parameters: no optimiser or weight decay touches them. The whole state is centroids(),
/// counts(), sums() and updates(), beside the config; restore() takes them back.
/// Threads and determinism: everything drawn is a function of the seed, the number of updates and the row's number; no
/// result depends on the number of workers. const calls may run at the same time; routers of different heads share
/// nothing.
/// Source: Roy et al. 2021, section 4.1, in the form of counts and sums of van den Oord et al. 2017 (VQ-VAE);
///   Average::batch_mean as in the Lingvo library, batch_direction as in the routing transformer for PyTorch; start,
///   schedule, revival and split are ours.
template <class T>
class OnlineKMeans {
 public:
  /// Centroids are random directions of the length of normalised rows, drawn from the seed.
  /// Requires: the ranges that KMeansConfig names (ValueError, one for all faults).
  explicit OnlineKMeans(const KMeansConfig& config) : state_((detail::check_config("OnlineKMeans", config), config)) {}

  const KMeansConfig& config() const { return state_.config(); }
  Index clusters() const { return config().clusters; }
  Index dim() const { return config().dim; }

  /// The centroids, clusters x dim.
  ConstView<T> centroids() const { return state_.rows(); }
  /// Moving average of the rows per cluster and update.
  std::span<const double> counts() const { return state_.counts(); }
  /// Moving average of the sums of rows, clusters x dim; with averages of batches the centroids, in double.
  std::span<const double> sums() const { return state_.sums(); }
  /// A number that no other centroids have: it changes whenever they move, and copies share it.
  std::uint64_t revision() const { return revision_; }
  /// Updates done; those that were frozen or had no rows do not count.
  Index updates() const { return updates_; }
  /// While frozen, update() does nothing.
  void freeze(bool frozen) { frozen_ = frozen; }
  bool frozen() const { return frozen_; }

  /// What the next update keeps of the past: min(decay, (1+t)/(10+t)) after t updates.
  double next_decay() const {
    const double t = static_cast<double>(updates_);
    return (std::min)(config().router.decay, (1 + t) / (10 + t));
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

  /// scores(i, c) = x_i . centroid_c, for memberships other than the nearest.
  ///
  /// Shapes: x tokens x dim, scores tokens x clusters. Requires: those, and scores apart from x and the centroids
  /// (ShapeError).
  /// Overwrites scores. The largest score of a row, the lowest cluster on ties, is at the label that assign() gives.
  /// Threads and determinism: a row's bits depend on that row, the centroids and the instruction set alone.
  /// Cost: 2 tokens clusters dim operations.
  void scores(ConstView<T> x, View<T> scores, Context& context) const {
    const char* const function = "OnlineKMeans::scores";
    detail::check_shape<T>(function, "x", x, x.rows(), dim());
    detail::check_shape<T>(function, "scores", scores, x.rows(), clusters());
    detail::check_no_alias<T>(function, "scores", scores, "x", x);
    detail::check_no_alias<T>(function, "scores", scores, "centroids", centroids());
    // scores = x centroids^T
    if (x.rows() > 0) product_input_gradient<T>(x, centroids(), scores, context);
  }

  /// Adds rows, each to the count and sum of its label, and offers them to the sample.
  ///
  /// Shapes: x tokens x dim, labels tokens, statistics of this router's clusters and dim.
  /// Requires: those (ShapeError), labels in [0, clusters) or -1, a head of the statistics (ValueError).
  /// Adds into statistics. Rows labelled -1 and rows with NaN or infinity are left out: one bad batch spoils no
  /// centroid.
  /// Threads and determinism: every sum runs in row order, so micro-batches in sequence are bit-identical to one
  /// batch.
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
            statistics.offer(head, x.row(i), config().seed, updates_);
          }
        return;
      }
      const Index begin = task * columns, end = (std::min)(d, begin + columns);
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
      statistics.offer(head, row, config().seed, updates_);
    }
  }

  /// Moves the centroids by what was observed; nothing else does but set_centroids(), restore() and copy_state().
  ///
  /// Formula: the first update takes the centroids from the sample (k-means++, then Lloyd steps), with counts and sums
  /// scaled to the rows observed. Where the sample has fewer different rows than clusters, the others keep their random
  /// direction.
  ///
  /// Later updates, with n_c rows of sum s_c in cluster c and l = next_decay():
  ///     N_c = l N_c + (1-l) n_c,   S_c = l S_c + (1-l) s_c,   and where n_c > 0   centroid_c = S_c / N_c;
  /// with Average::batch_mean   N_c as above,   and where n_c > 0   centroid_c = l centroid_c + (1-l) s_c / n_c;
  /// batch_direction takes s_c scaled to the length of normalised rows for s_c / n_c.
  /// With renormalise, centroids that moved are then scaled to that length; averages of batches continue from the
  /// scaled one. Centroids of clusters without rows stay. Counts, sums and centroids are kept in double.
  ///
  /// Split (see split_share): in every eighth update the cluster that is fullest before it, if overfull then and after
  /// it, gives half its count to the least used one. That moves to a row of the sample that is the fullest
  /// cluster's, cut to the length of its centroid.
  /// Revival (see dead_share): a dead cluster becomes a random row of the sample, with N_c the mean count and
  /// S_c = N_c centroid_c. The row is cut to the mean length of the live centroids: at full length it would win distant
  /// rows.
  /// A cluster that was split or revived is not split in the next update. Without counts of the past (set_centroids) no
  /// cluster is dead or overfull, and those without rows get the mean count.
  ///
  /// Requires: statistics of this router's clusters and dim (ShapeError); a head of theirs, all numbers finite, counts
  /// not negative (ValueError). Without observed rows, or frozen, nothing changes.
  /// Allocates in the first update only.
  /// Threads and determinism: a function of the state, the config, the statistics and their sample. Several machines
  /// that share these move to the same bits.
  /// Cost: clusters * dim; the first one sample * clusters * dim * (7 + log clusters); a split that finds no row to
  /// take sample * clusters * dim.
  void update(const RouterStatistics<T>& statistics, Index head) {
    check_update(statistics, head);
    update_checked(statistics, head);
  }

  /// update() of statistics that check_update() has let pass.
  ///
  /// With updates() > 0 nothing is allocated and nothing throws. The first update allocates, and what it throws may
  /// leave this router half written: to keep its state, update a copy, then call copy_state().
  void update_checked(const RouterStatistics<T>& statistics, Index head) {
    if (frozen_) return;
    const std::span<const double> counts = statistics.counts(head);
    double rows = 0;
    for (const double count : counts) rows += count;
    if (!(rows > 0)) return;
    const ConstView<T> samples = statistics.samples(head);
    if (updates_ == 0 && samples.rows() > 0)
      state_.start(samples, rows);
    else
      average(counts, statistics.sums(head), samples);
    ++updates_;
    revision_ = detail::next_revision();
  }

  /// The state of another router of the same config, revision included. Allocates nothing, throws nothing; views of the
  /// centroids stay valid.
  void copy_state(const OnlineKMeans& other) noexcept {
    COTERIE_ASSERT(config() == other.config());
    state_.restore(other.centroids(), other.counts(), other.sums());
    updates_ = other.updates_;
    revision_ = other.revision_;
  }

  /// Throws what update() would throw for these statistics, and does nothing else.
  void check_update(const RouterStatistics<T>& statistics, Index head) const {
    const char* const function = "OnlineKMeans::update";
    check_statistics(function, statistics, head);
    check_counts(function, statistics.counts(head));
    check_sums(function, statistics.sums(head));
    const Index filled = statistics.samples(head).rows();
    if (filled < 0 || filled > statistics.sample_limit())
      detail::fail<ValueError>(function, "sample_counts", detail::join("in [0, ", statistics.sample_limit(), "]"),
                               filled);
    if (!detail::finite_rows(statistics.samples(head)))
      detail::fail<ValueError>(function, "samples", "finite rows", "NaN or infinity");
  }

  /// A warm start: sets the centroids, so that the next update averages on from them instead of taking its own from the
  /// sample.
  ///
  /// Shapes: centroids clusters x dim; counts clusters or empty. Requires: those (ShapeError); finite numbers, no
  /// negative count, `updates` at least 1 (ValueError).
  /// Overwrites the whole state. With renormalise, the centroids are scaled to the length of normalised rows.
  /// `counts`: how many rows an update has brought to each cluster, which is what the given centroids weigh against
  /// rows to come. Empty: unknown; with Average::counts_and_sums the next update then moves a cluster to the mean of
  /// its rows, with batch_mean the given centroid counts as any other; clusters without rows stay, and are not dead
  /// yet.
  /// `updates`: where the schedule of next_decay() continues.
  void set_centroids(ConstView<T> centroids, std::span<const double> counts = {}, Index updates = 1) {
    const char* const function = "OnlineKMeans::set_centroids";
    check_centroids(function, centroids);
    if (!counts.empty()) check_counts(function, counts);
    if (updates < 1) detail::fail<ValueError>(function, "updates", "at least 1", updates);
    for (Index c = 0; c < clusters(); ++c)
      state_.set_centroid(c, centroids.row(c), (std::numeric_limits<double>::max)(),
                          counts.empty() ? 0.0 : counts[static_cast<std::size_t>(c)]);
    updates_ = updates;
    revision_ = detail::next_revision();
  }

  /// Takes back a state that centroids(), counts(), sums() and updates() of a router of the same config gave: goes on
  /// as if it had not stopped.
  /// Requires: their shapes (ShapeError); finite numbers, no negative count or number of updates (ValueError).
  void restore(ConstView<T> centroids, std::span<const double> counts, std::span<const double> sums, Index updates) {
    const char* const function = "OnlineKMeans::restore";
    check_centroids(function, centroids);
    check_counts(function, counts);
    check_sums(function, sums);
    if (updates < 0) detail::fail<ValueError>(function, "updates", "at least 0", updates);
    state_.restore(centroids, counts, sums);
    updates_ = updates;
    revision_ = detail::next_revision();
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

  void check_centroids(const char* function, ConstView<T> centroids) const {
    detail::check_shape<T>(function, "centroids", centroids, clusters(), dim());
    if (!detail::finite_rows(centroids))
      detail::fail<ValueError>(function, "centroids", "finite numbers", "NaN or infinity");
  }

  void check_counts(const char* function, std::span<const double> counts) const {
    if (counts.size() != this->counts().size())
      detail::fail<ShapeError>(function, "counts", this->counts().size(), counts.size());
    if (!detail::finite_row(counts.data(), static_cast<Index>(counts.size())))
      detail::fail<ValueError>(function, "counts", "finite numbers", "NaN or infinity");
    for (const double count : counts)
      if (count < 0) detail::fail<ValueError>(function, "counts", "at least 0", count);
  }

  void check_sums(const char* function, std::span<const double> sums) const {
    if (sums.size() != this->sums().size())
      detail::fail<ShapeError>(function, "sums", this->sums().size(), sums.size());
    if (!detail::finite_row(sums.data(), static_cast<Index>(sums.size())))
      detail::fail<ValueError>(function, "sums", "finite numbers", "NaN or infinity");
  }

  // An update that is not the first.
  void average(std::span<const double> counts, std::span<const double> sums, ConstView<T> samples) {
    const bool past = state_.mean_count() > 0;
    const Index candidate = detail::split_candidate(state_, updates_);
    state_.average(counts, sums, next_decay());
    if (!past) {
      const double mean = state_.mean_count();
      for (Index c = 0; c < clusters(); ++c)
        if (!(counts[static_cast<std::size_t>(c)] > 0)) state_.settle(c, mean);
    } else if (samples.rows() > 0) {
      const Index taken = detail::split_cluster(state_, candidate, updates_, samples);
      detail::revive_clusters(state_, counts, updates_, samples, taken);
    }
  }

  detail::Centroids<T> state_;
  Index updates_ = 0;
  std::uint64_t revision_ = detail::next_revision();
  bool frozen_ = false;
};

}  // namespace coterie
