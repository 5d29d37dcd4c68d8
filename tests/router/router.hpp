// A router with what it needs to learn: for the router's tests.
#pragma once

#include <cstdint>
#include <vector>

#include "coterie/router/kmeans.hpp"
#include "rows.hpp"

namespace router_test {

template <class T>
struct Router {
  Router(Index clusters, Index dim, double decay = 0.9, std::uint64_t seed = 1, Index sample = 0)
      : Router({.clusters = clusters, .dim = dim, .seed = seed, .router = {.decay = decay}}, sample) {}
  explicit Router(const coterie::KMeansConfig& config, Index sample = 0)
      : kmeans(config), statistics(1, config.clusters, config.dim, sample) {}

  std::vector<std::int32_t> assign(const RowMatrix<T>& rows) {
    std::vector<std::int32_t> labels(static_cast<std::size_t>(rows.rows()), -7);
    kmeans.assign(rows, labels, context);
    return labels;
  }
  void observe(const RowMatrix<T>& rows) { kmeans.observe(rows, assign(rows), statistics, 0, context); }
  void step(const RowMatrix<T>& rows) {
    observe(rows);
    kmeans.update(statistics, 0);
    statistics.clear();
  }
  // As step(), with labels of one's own.
  void step(const RowMatrix<T>& rows, const std::vector<std::int32_t>& labels) {
    kmeans.observe(rows, labels, statistics, 0, context);
    kmeans.update(statistics, 0);
    statistics.clear();
  }
  RowMatrix<T> copy() const { return kmeans.centroids().eigen(); }
  double count(Index c) const { return kmeans.counts()[static_cast<std::size_t>(c)]; }
  double norm(Index c) const { return static_cast<double>(copy().row(c).norm()); }
  double load(const RowMatrix<T>& rows) {
    std::vector<double> counts(static_cast<std::size_t>(kmeans.clusters()), 0.0);
    for (const std::int32_t label : assign(rows)) counts[static_cast<std::size_t>(label)] += 1;
    return coterie::router_load(counts).perplexity;
  }

  coterie::OnlineKMeans<T> kmeans;
  coterie::RouterStatistics<T> statistics;
  coterie::Context context;
};

template <class T>
bool same_state(const coterie::OnlineKMeans<T>& a, const coterie::OnlineKMeans<T>& b) {
  return same_bits(a.centroids(), b.centroids()) && same_bits(a.counts(), b.counts()) &&
         same_bits(a.sums(), b.sums()) && a.updates() == b.updates();
}

}  // namespace router_test
