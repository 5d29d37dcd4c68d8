// Clusters that start again elsewhere: dead ones, and those that take over half of an overfull one.
#pragma once

#include <cstdint>
#include <span>

#include "coterie/core/random.hpp"
#include "coterie/router/centroids.hpp"

namespace coterie::detail {

/// Only updates whose number is a multiple of this split a cluster: the halves must show first what they are.
inline constexpr Index split_interval = 8;

template <class T>
bool overfull(const Centroids<T>& state, Index c) {
  return state.count(c) > state.config().router.split_share * state.mean_count();
}

/// The cluster that update number `update` splits if it is overfull after it too; -1: none.
///
/// Being overfull before as well keeps a cluster that the last update revived, with the mean count, from being split in
/// this one.
template <class T>
Index split_candidate(const Centroids<T>& state, Index update) {
  if (!(state.config().router.split_share > 0) || update % split_interval != 0) return -1;
  Index fullest = 0;
  for (Index c = 1; c < state.clusters(); ++c)
    if (state.count(c) > state.count(fullest)) fullest = c;
  return overfull(state, fullest) ? fullest : -1;
}

/// A row of the sample that is nearest to cluster c but does not coincide with its centroid; -1: none found.
///
/// Draws until one fits, as many times as there are rows: few where c is overfull. A row repeated all over has nothing
/// to split.
template <class T>
Index draw_member(const Centroids<T>& state, Index c, ConstView<T> samples, std::uint64_t stream) {
  const Index d = state.dim();
  const double length = state.norm(state.rows().row(c));
  for (Index attempt = 0; attempt < samples.rows(); ++attempt) {
    const Index row = random_below(samples.rows(), state.config().seed, stream, static_cast<std::uint64_t>(attempt));
    const T* const x = samples.row(row);
    const T score = dot(x, state.rows().row(c), d);
    if (static_cast<double>(score) >= (1 - 1e-5) * length * state.norm(x)) continue;
    bool nearest = true;
    for (Index other = 0; other < state.clusters() && nearest; ++other) {
      const T rival = dot(x, state.rows().row(other), d);
      nearest = other < c ? rival < score : rival <= score;
    }
    if (nearest) return row;
  }
  return -1;
}

/// Splits the candidate: the least used cluster moves to a row of the candidate's, and they share its count.
///
/// The row is cut to the length of the candidate's centroid, so that both compete by direction. Nothing happens where
/// the candidate is no longer overfull, no row can be drawn, or the least used cluster has half its count: that would
/// gain nothing. Returns the cluster that was moved; -1: none.
template <class T>
Index split_cluster(Centroids<T>& state, Index candidate, Index update, ConstView<T> samples) {
  if (candidate < 0 || !overfull(state, candidate)) return -1;
  Index least = candidate;
  for (Index c = 0; c < state.clusters(); ++c)
    if (state.count(c) < state.count(least)) least = c;
  const double half = state.count(candidate) / 2;
  if (!(state.count(least) < half)) return -1;
  const Index row = draw_member(state, candidate, samples, router_stream(RouterStream::split, update));
  if (row < 0) return -1;
  state.halve(candidate);
  state.set_centroid(least, samples.row(row), state.norm(state.rows().row(candidate)), half);
  return least;
}

/// Moves every dead cluster, one without rows in the batch of these counts and below dead_share of the mean count, to a
/// random row of the sample, cut to the mean length of the live centroids, with the mean count. `kept` is not dead.
template <class T>
void revive_clusters(Centroids<T>& state, std::span<const double> counts, Index update, ConstView<T> samples,
                     Index kept) {
  const double mean = state.mean_count(), limit = state.config().router.dead_share * mean;
  const auto dead = [&](Index c) {
    return c != kept && !(counts[static_cast<std::size_t>(c)] > 0) && state.count(c) < limit;
  };
  double length = 0;
  Index live = 0;
  for (Index c = 0; c < state.clusters(); ++c)
    if (!dead(c)) length += state.norm(state.rows().row(c)), ++live;
  if (live == state.clusters()) return;
  COTERIE_ASSERT(live > 0);
  length /= static_cast<double>(live);
  const std::uint64_t stream = router_stream(RouterStream::revival, update);
  for (Index c = 0; c < state.clusters(); ++c)
    if (dead(c)) {
      const Index row = random_below(samples.rows(), state.config().seed, stream, static_cast<std::uint64_t>(c));
      state.set_centroid(c, samples.row(row), length, mean);
    }
}

}  // namespace coterie::detail
