// The clusters of the keys of a cache: the memory of KeyIndex.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "coterie/core/finite.hpp"
#include "coterie/core/offsets.hpp"
#include "coterie/core/random.hpp"
#include "coterie/kernel/nearest.hpp"
#include "coterie/router/seeding.hpp"

namespace coterie::detail {

/// Lists of rows by cluster, for every key/value head of a cache. Config: KeyIndexConfig.
template <class T, class Config>
class KeyClusters {
 public:
  struct Head {
    Index count = 0;         // clusters in use
    RowMatrix<T> centroids;  // d x count, a column each, relative to the mean
    RowMatrix<T> nearest;    // count x (d + 1): centroid and minus half its square, for nearest_centroids
    RowMatrix<T> mean;       // 1 x d: mean of the keys of the sample
    std::vector<std::vector<std::int32_t>> members;  // ascending
  };

  explicit KeyClusters(const Config& config) : config_(config) {
    Faults faults("KeyIndex");
    faults.expect(config.kv_heads >= 1, "kv_heads", "at least 1", config.kv_heads);
    faults.expect(config.clusters >= 1, "clusters", "at least 1", config.clusters);
    faults.expect(config.sinks >= 0, "sinks", "at least 0", config.sinks);
    faults.expect(config.recent >= 0, "recent", "at least 0", config.recent);
    faults.expect(config.sample >= 0, "sample", "at least 0", config.sample);
    faults.expect(config.steps >= 0, "steps", "at least 0", config.steps);
    constexpr Index most = (std::numeric_limits<std::int32_t>::max)() / 64;  // so that no product of settings overflows
    for (const auto& [name, value] : {std::pair{"clusters", config.clusters}, std::pair{"sinks", config.sinks}})
      faults.expect(value <= most, name, join("at most ", most), value);
    faults.raise();
    heads_.resize(static_cast<std::size_t>(config.kv_heads));
  }

  const Config& config() const { return config_; }
  Index tokens() const { return tokens_; }
  Index dim() const { return dim_; }
  /// Keys that are in clusters; every query sees all others.
  RowRange clustered() const { return clustered_; }

  const Head& of(const char* function, Index kv_head) const {
    if (kv_head < 0 || kv_head >= config_.kv_heads)
      fail<ValueError>(function, "kv_head", join("in [0, ", config_.kv_heads, ")"), kv_head);
    return heads_[static_cast<std::size_t>(kv_head)];
  }

  /// The largest number of keys that a plan of `probed` clusters can list.
  Index most_listed(Index probed) const {
    const Index inside = clustered_.count();
    return tokens_ - inside + (probed < config_.clusters ? (std::min)(inside, probed * longest_) : inside);
  }

  /// Makes new clusters of the keys between the first and the recent ones; the old ones stay until the new are
  /// complete.
  void build(ConstView<T> k, Context& context) {
    check_keys("KeyIndex::build", k, 0, (std::max<Index>)(1, k.cols() / config_.kv_heads));
    KeyClusters made(config_);
    made.dim_ = k.cols() / config_.kv_heads;
    made.tokens_ = k.rows();
    const Index begin = (std::min)(config_.sinks, made.tokens_), end = (std::max)(begin, made.tokens_ - config_.recent);
    made.clustered_ = {begin, begin};
    if (begin < end) {
      std::vector<RowMatrix<T>> samples(made.heads_.size());
      context.for_each(config_.kv_heads, [&](Index h, Index) {
        samples[static_cast<std::size_t>(h)] = made.seed(k.columns(h * made.dim_, made.dim_), {begin, end}, h);
      });
      for (std::size_t h = 0; h < made.heads_.size(); ++h) made.settle(made.heads_[h], samples[h], context);
      made.take(k, end, context);
    }
    *this = std::move(made);
  }

  /// Puts keys that have left the recent ones into the existing clusters.
  void append(ConstView<T> k, Context& context) {
    check_keys("KeyIndex::append", k, tokens_, dim_ > 0 ? dim_ : (std::max<Index>)(1, k.cols() / config_.kv_heads));
    if (heads_.front().count > 0) take(k, k.rows() - config_.recent, context);
    dim_ = k.cols() / config_.kv_heads;
    tokens_ = k.rows();
  }

 private:
  void check_keys(const char* function, ConstView<T> k, Index rows, Index d) const {
    if (k.rows() < rows) fail<ShapeError>(function, "k", join("at least ", rows, " rows"), join(k.rows(), " rows"));
    constexpr Index most = (std::numeric_limits<std::int32_t>::max)();
    if (k.rows() > most) fail<ShapeError>(function, "k", join("at most ", most, " rows"), join(k.rows(), " rows"));
    check_shape<T>(function, "k", k, k.rows(), config_.kv_heads * d);
  }

  /// Finds the first centroids of a head, from a sample of its keys. Returns the sample: rows minus their mean, and a
  /// column of ones.
  RowMatrix<T> seed(ConstView<T> k, RowRange range, Index kv_head) {
    Head& head = heads_[static_cast<std::size_t>(kv_head)];
    const std::uint64_t seed = random_bits(config_.seed, static_cast<std::uint64_t>(kv_head), 0);
    const Index most = config_.sample > 0 ? config_.sample : 32 * config_.clusters;
    std::vector<Index> rows = draw_rows(range.count(), most, seed);
    std::erase_if(rows, [&](Index i) { return !finite_row(k.row(range.begin + i), dim_); });
    const Index count = static_cast<Index>(rows.size());
    RowMatrix<T> sample(count, dim_ + 1);
    std::vector<double> sum(static_cast<std::size_t>(dim_), 0.0);
    for (Index i = 0; i < count; ++i)
      for (Index j = 0; j < dim_; ++j)
        sum[static_cast<std::size_t>(j)] += static_cast<double>(k(range.begin + rows[static_cast<std::size_t>(i)], j));
    head.mean.setZero(1, dim_);
    for (Index j = 0; j < dim_ && count > 0; ++j)
      head.mean(0, j) = static_cast<T>(sum[static_cast<std::size_t>(j)] / static_cast<double>(count));
    for (Index i = 0; i < count; ++i)
      centre(head, k.row(range.begin + rows[static_cast<std::size_t>(i)]), view(sample).row(i));

    RowMatrix<T> centroids = RowMatrix<T>::Zero(config_.clusters, dim_);
    SeedingScratch<T> scratch;
    // One centroid takes all keys where none of the sample is finite.
    head.count = (std::max<Index>)(1, seed_centroids<T>(view(std::as_const(sample)).columns(0, dim_), view(centroids),
                                                        seed, scratch));
    head.nearest.resize(head.count, dim_ + 1);
    for (Index c = 0; c < head.count; ++c) set_centroid(head, c, centroids.data() + c * dim_);
    return sample;
  }

  /// Runs Lloyd steps by distance; a centroid without rows stays. (The lloyd_step of routers is by dot product.)
  void settle(Head& head, const RowMatrix<T>& sample, Context& context) const {
    std::vector<std::int32_t> labels(static_cast<std::size_t>(sample.rows()));
    std::vector<double> counts, sums;
    std::vector<T> centroid(static_cast<std::size_t>(dim_));
    for (Index step = 0; step < config_.steps; ++step) {
      nearest_centroids<T>(sample, head.nearest, labels, context);
      counts.assign(static_cast<std::size_t>(head.count), 0.0);
      sums.assign(static_cast<std::size_t>(head.count * dim_), 0.0);
      for (Index i = 0; i < sample.rows(); ++i) {
        const Index c = labels[static_cast<std::size_t>(i)];
        counts[static_cast<std::size_t>(c)] += 1;
        for (Index j = 0; j < dim_; ++j)
          sums[static_cast<std::size_t>(c * dim_ + j)] += static_cast<double>(sample(i, j));
      }
      for (Index c = 0; c < head.count; ++c) {
        const double count = counts[static_cast<std::size_t>(c)];
        if (count == 0) continue;
        for (Index j = 0; j < dim_; ++j)
          centroid[static_cast<std::size_t>(j)] = static_cast<T>(sums[static_cast<std::size_t>(c * dim_ + j)] / count);
        set_centroid(head, c, centroid.data());
      }
    }
    head.centroids = head.nearest.leftCols(dim_).transpose();
    head.members.assign(static_cast<std::size_t>(head.count), {});
  }

  /// to = (key - mean, 1), whose dot product with a row (c, -c.c/2) is (|key - mean|^2 - |key - mean - c|^2) / 2.
  void centre(const Head& head, const T* key, T* to) const {
    for (Index j = 0; j < dim_; ++j) to[j] = key[j] - head.mean(0, j);
    to[dim_] = 1;
  }
  void set_centroid(Head& head, Index c, const T* centroid) const {
    T* const row = head.nearest.data() + c * (dim_ + 1);
    std::copy(centroid, centroid + dim_, row);
    row[dim_] = striped_sum<T>(dim_, [=](Index j) { return centroid[j] * centroid[j]; }) / -2;
  }

  /// Puts the keys before `end` that are in no cluster yet into clusters: all of them, in all heads, or on error none.
  void take(ConstView<T> k, Index end, Context& context) {
    const Index begin = clustered_.end, longest = longest_;
    try {
      take_some(k, end, context);
    } catch (...) {
      for (Head& head : heads_)
        for (std::vector<std::int32_t>& members : head.members)
          while (!members.empty() && members.back() >= begin) members.pop_back();
      clustered_.end = begin;
      longest_ = longest;
      throw;
    }
  }

  void take_some(ConstView<T> k, Index end, Context& context) {
    constexpr Index most = 8192;  // keys at a time
    while (clustered_.end < end) {
      const Index begin = clustered_.end, count = (std::min)(end - begin, most), chunk = 256;
      Arena& arena = context.workspace().shared();
      Arena::Scope scope(arena);
      const View<T> rows = arena.matrix<T>(count, dim_ + 1);
      std::int32_t* const labels = arena.take<std::int32_t>(count);
      for (Index h = 0; h < config_.kv_heads; ++h) {
        Head& head = heads_[static_cast<std::size_t>(h)];
        context.for_chunks(count, chunk, [&](Index first, Index last, Index) {
          for (Index i = first; i < last; ++i) centre(head, k.row(begin + i) + h * dim_, rows.row(i));
        });
        nearest_centroids<T>(rows, head.nearest, {labels, static_cast<std::size_t>(count)}, context);
        for (Index i = 0; i < count; ++i) {
          std::vector<std::int32_t>& members = head.members[static_cast<std::size_t>(labels[i])];
          members.push_back(static_cast<std::int32_t>(begin + i));
          longest_ = (std::max)(longest_, static_cast<Index>(members.size()));
        }
      }
      clustered_.end = begin + count;
    }
  }

  Config config_;
  Index tokens_ = 0, dim_ = 0;
  RowRange clustered_;
  Index longest_ = 0;  // keys of the largest cluster
  std::vector<Head> heads_;
};

}  // namespace coterie::detail
